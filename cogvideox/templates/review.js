"use strict";
const $ = id => document.getElementById(id);
const cards = [...document.querySelectorAll("article")];
const key = "review " + document.body.dataset.store;
const box = card => card.querySelector("input");
const asWritten = card => card.dataset.ticked === "1";
const remembered = () => { try { return JSON.parse(localStorage.getItem(key)) || {}; } catch { return {}; } };
const changed = () => cards.filter(card => box(card).checked !== asWritten(card));
const list = () => cards.map(card => (box(card).checked ? "keep  " : "leave ") + card.dataset.listed + "\n").join("");
const shown = () => cards.filter(card => !card.hidden);

const update = () => {
  for (const card of cards) card.classList.toggle("ticked", box(card).checked);
  const different = changed();
  $("count").textContent = cards.filter(card => box(card).checked).length + " of " + cards.length + " are trained" +
    (different.length ? ", " + different.length + " changed here" : "");
  const choice = Object.fromEntries(different.map(card => [card.dataset.listed, box(card).checked]));
  try { localStorage.setItem(key, JSON.stringify(choice)); } catch { /* a browser may keep nothing for file: pages */ }
};
const filter = () => {
  const wanted = $("filter").value;
  for (const card of cards) {
    const fits = {"": true, train: box(card).checked, out: !box(card).checked, changed: box(card).checked !== asWritten(card)};
    card.hidden = !(wanted in fits ? fits[wanted] : card.classList.contains(wanted));
  }
};
const stop = () => {
  for (const video of document.querySelectorAll("video")) { video.previousElementSibling.hidden = false; video.remove(); }
};
const play = card => {
  const wasPlaying = card.querySelector("video");
  stop();
  if (wasPlaying) return;
  const video = document.createElement("video");
  const [start, end] = [Number(card.dataset.start), Number(card.dataset.end)];
  video.muted = video.controls = video.autoplay = true;
  video.src = card.dataset.film + "#t=" + start + "," + end;
  video.ontimeupdate = () => { if (video.currentTime >= end || video.currentTime < start - 0.2) { video.currentTime = start; video.play(); } };
  card.querySelector("img").hidden = true;
  card.querySelector(".strip").append(video);
};
const move = step => {
  const visible = shown();
  const at = visible.indexOf(document.activeElement.closest("article"));
  const next = visible[Math.min(Math.max(at + step, 0), visible.length - 1)];
  if (next) { next.focus({preventScroll: true}); next.scrollIntoView({block: "nearest"}); }
};

const earlier = remembered();
for (const card of cards) {
  const listed = card.dataset.listed;
  box(card).checked = listed in earlier ? earlier[listed] : asWritten(card);
  box(card).onchange = update;
  card.querySelector(".strip").onclick = () => { card.focus({preventScroll: true}); play(card); };
}
const setAll = value => { for (const card of shown()) box(card).checked = value; update(); };
$("filter").onchange = filter;
$("tick").onclick = () => setAll(true);
$("untick").onclick = () => setAll(false);
$("reset").onclick = () => { for (const card of cards) box(card).checked = asWritten(card); update(); filter(); };
$("save").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([list()], {type: "text/plain"}));
  link.download = "review.txt";
  link.click();
};
$("copy").onclick = () => {
  $("list").hidden = false;
  $("list").value = list();
  $("list").select();
  document.execCommand("copy");  // the newer API is not available on file: pages
  $("copy").textContent = "Copied";
};
document.onkeydown = event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, textarea")) return;
  const card = document.activeElement.closest("article");
  if (event.key === "j") move(1);
  else if (event.key === "k") move(-1);
  else if (event.key === "x" && card) { box(card).checked = !box(card).checked; update(); }
  else if (event.key === "p" && card) play(card);
  else return;
  event.preventDefault();
};
update();
