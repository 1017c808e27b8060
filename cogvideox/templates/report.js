"use strict";
const $ = id => document.getElementById(id);
const cells = [...document.querySelectorAll("video[data-step]")];
for (const video of cells) {
  const bytes = Uint8Array.from(atob(video.getAttribute("src").split(",")[1]), c => c.charCodeAt(0));
  video.src = URL.createObjectURL(new Blob([bytes], {type: "video/mp4"}));
  // Controls would cover a small video: show them on hover or focus.
  video.controls = false;
  video.tabIndex = 0;
  video.onmouseenter = video.onfocus = () => { video.controls = true; };
  video.onmouseleave = video.onblur = () => { video.controls = false; };
}
if (cells.length) {
  const [left, right] = [$("left"), $("right")];
  let row = [], playing = false;
  const start = videos => videos.forEach(video => { video.currentTime = 0; if (playing) video.play().catch(() => {}); });
  const say = video => video.dataset.step === "0" ? "base model, step 0" : "step " + video.dataset.step;
  const show = () => {
    const now = row[$("step").value];
    $("shown").textContent = now.dataset.step;
    $("first").textContent = say(row[0]);
    $("now").textContent = say(now);
    if (left.src !== row[0].src) left.src = row[0].src;
    if (right.src !== now.src) right.src = now.src;
    start([left, right]);
  };
  const choose = () => {
    row = cells.filter(video => video.dataset.row === $("row").value);
    $("step").max = row.length - 1;
    $("step").value = row.length - 1;
    show();
  };
  for (const option of [...$("row").options]) if (!cells.some(video => video.dataset.row === option.value)) option.remove();
  $("compare").hidden = false;
  $("row").onchange = choose;
  $("step").oninput = show;
  $("play").onclick = () => {
    playing = !playing;
    $("play").textContent = playing ? "Pause all" : "Play all";
    const all = [left, right, ...cells];
    if (playing) start(all); else all.forEach(video => video.pause());
  };
  choose();
}
if ($("copy")) {
  $("copy").hidden = false;
  $("copy").onclick = () => {
    getSelection().selectAllChildren($("snippet"));
    document.execCommand("copy");  // the newer API is not available on file: pages
    $("copy").textContent = "Copied";
  };
}
