"""The geometry of the report's charts, in pixels. templates/parts.html.j2 renders it as SVG."""

import math

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 250, 56, 12, 12, 34
CURVE_POINTS, HOVER_COLUMNS = 400, 80
LONGEST_LABEL = 7  # characters that fit beside the left edge
DOTTED_POINTS = 30  # a line of at most this many points is drawn with dots


# -----------------------------------------------------------------------------
# Numbers


def number(value):
    """The value if it is a finite number, else None."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def short(value):
    """A number with four significant digits."""
    return f"{value:.4g}"


def points_of(lines, name):
    """[(step, value)] of the lines of metrics.jsonl that have a finite value of this name."""
    return [(line["step"], line[name]) for line in lines if number(line.get(name)) is not None]


def evenly(items, count):
    """`count` of the items, evenly spaced, without repeats."""
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)] if count else []


def thin(points, most=CURVE_POINTS):
    """At most about `most` points of a curve: the minimum and the maximum of each piece, so that no spike is lost."""
    if len(points) <= most:
        return points
    pieces, thinned = most // 2, []
    for i in range(pieces):
        piece = points[i * len(points) // pieces : (i + 1) * len(points) // pieces]
        thinned += sorted({min(piece, key=lambda p: p[1]), max(piece, key=lambda p: p[1])})
    return thinned


def running_mean(points, window):
    """The exponential moving average over about `window` points, bias-corrected as in Adam."""
    mean, weight, result = 0.0, 0.0, []
    for step, value in points:
        mean, weight = mean + (value - mean) / window, weight + (1 - weight) / window
        result.append((step, mean / weight))
    return result


def ticks(low, high, count=5):
    """Round numbers from low to high, about `count` of them, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(rough))
    gap = min((scale * factor for factor in (1, 2, 5, 10)), key=lambda gap: abs(math.log(gap / rough)))
    return [i * gap for i in range(math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9) + 1)]


def axis(values, length, is_log=False, margin=0.05):
    """The scale of an axis: (value -> distance from the start in pixels, ticks)."""
    change = math.log10 if is_log else float
    low, high = change(min(values)), change(max(values))
    if high - low <= 1e-12 * max(1.0, abs(high)):  # a single value: widen the range
        low, high = low - max(abs(low), 1e-9) * 0.1, high + max(abs(high), 1e-9) * 0.1
    low, high = low - margin * (high - low), high + margin * (high - low)
    marks = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)] if is_log else ticks(low, high)
    return lambda value: (change(value) - low) / (high - low) * length, marks


# -----------------------------------------------------------------------------
# Charts: dicts that the template draws; `absent` says why a chart is empty


def figure(title, absent="", note="", legend=(), **drawn):
    """A chart. legend: [(label, class)]. drawn: grid, ticks, lines, dots, bars, columns and mark, with positions in pixels."""
    empty = {"grid": [], "ticks": [], "axis": "", "mark": None, "lines": [], "dots": [], "bars": [], "columns": []}
    return empty | {"title": title, "absent": absent, "note": note, "legend": legend} | drawn


def tick_labels(marks):
    """The values of an axis as text, with the fewest digits that give each within a hundredth of their distance: as 0.0002, or as 2e-4
    where that would be cut off at the left edge."""
    gap = min((abs(b - a) for a, b in zip(marks, marks[1:], strict=False)), default=max(map(abs, marks), default=1.0))

    def fewest(kind):
        texts = [[f"{value:.{digits}{kind}}" for value in marks] for digits in range(16)]
        exact = (text for text in texts if all(abs(float(t) - v) <= gap / 100 for t, v in zip(text, marks, strict=True)))
        return next(exact, texts[-1])

    plain = fewest("f")
    if max(map(len, plain), default=0) <= LONGEST_LABEL:
        return plain
    return [label.replace("e+0", "e").replace("e-0", "e-").replace("e+", "e") for label in fewest("e")]


def grid_of(marks, y):
    """The horizontal lines of a chart with their values."""
    return [{"y": round(y(value), 1), "label": label} for value, label in zip(marks, tick_labels(marks), strict=True)]


def line_chart(title, series, note="", mark=None):
    """A line chart over steps. series: [(label, class, points)]; mark: (step, label) of a vertical line.

    The axis of positive values that span more than a factor of 100 is logarithmic.
    """
    series = [(label, kind, points) for label, kind, points in series if points]
    if not series:
        return figure(title, absent="no values logged yet")
    values = [value for _, _, points in series for _, value in points]
    steps = [step for _, _, points in series for step, _ in points] + ([mark[0]] if mark else [])
    is_log = min(values) > 0 and max(values) / min(values) > 100
    across, step_marks = axis(steps, WIDTH - LEFT - RIGHT, margin=0.01)
    up, value_marks = axis(values, HEIGHT - TOP - BOTTOM, is_log)
    x, y = (lambda step: LEFT + across(step)), (lambda value: HEIGHT - BOTTOM - up(value))
    lines, dots = [], []
    for _, kind, points in series:
        drawn = [(round(x(step), 1), round(y(value), 1)) for step, value in thin(points)]
        lines.append({"kind": kind, "points": " ".join(f"{left},{top}" for left, top in drawn)})
        if len(drawn) <= DOTTED_POINTS and "base" not in kind:
            dots += [{"kind": kind, "x": left, "y": top} for left, top in drawn]
    return figure(
        title,
        note=" ".join(part for part in (note, "Logarithmic." if is_log else "") if part),
        legend=[(label, kind) for label, kind, _ in series] + ([(mark[1], "marked")] if mark else []),
        grid=grid_of(value_marks, y),
        ticks=[{"x": round(x(step), 1), "label": int(step)} for step in step_marks if step == int(step)],
        axis="optimizer step",
        mark=round(x(mark[0]), 1) if mark else None,
        lines=lines,
        dots=dots,
        columns=hover_columns(series, x),
    )


def hover_columns(series, x):
    """Invisible columns over a chart, each with the values at its step as a tooltip."""
    known = {}
    for label, _, points in series:
        for step, value in points:
            known.setdefault(step, []).append(f"{label} {short(value)}")
    steps = sorted(known)
    steps = steps if len(steps) <= HOVER_COLUMNS else evenly(steps, HOVER_COLUMNS)
    edges = [LEFT, *((x(a) + x(b)) / 2 for a, b in zip(steps, steps[1:], strict=False)), WIDTH - RIGHT]
    return [
        {"x": round(start, 1), "width": round(max(0, end - start), 1), "label": f"step {step}: {', '.join(known[step])}"}
        for step, start, end in zip(steps, edges, edges[1:], strict=False)
    ]


def band_chart(title, bands, note):
    """Grouped bars: the current loss beside the base model's, for each band of timesteps and each split."""
    splits = [("training clips", "one", "train"), ("held-out clips", "two", "held_out")]
    shown = [split for split in splits if any(number(band.get(split[2])) is not None for band in bands)]
    values = [number(band.get(key + end)) for band in bands for _, _, key in shown for end in ("", "_base")]
    values = [value for value in values if value is not None and value >= 0]
    if not values:
        return figure(title, absent="no evaluation yet")
    up, value_marks = axis([0, *values], HEIGHT - TOP - BOTTOM, margin=0.0)
    room = (WIDTH - LEFT - RIGHT) / len(bands)
    width = min(34, room * 0.8 / (2 * len(shown)))
    bars, names = [], []
    for place, band in enumerate(bands):
        middle, name = LEFT + (place + 0.5) * room, band.get("timestep", "")
        names.append({"x": round(middle, 1), "label": name})
        left = middle - width * len(shown)
        for label, kind, key in shown:
            for end, model in (("_base", "base model"), ("", "now")):
                value = number(band.get(key + end))
                if value is not None and value >= 0:
                    bars.append(
                        {
                            "kind": f"{kind} base" if end else kind,
                            "x": round(left + 1, 1),
                            "y": round(HEIGHT - BOTTOM - up(value), 1),
                            "width": round(width - 2, 1),
                            "height": round(up(value), 1),
                            "label": f"timestep {name}, {label}, {model}: {short(value)}",
                        }
                    )
                left += width
    legend = [
        (f"{label}, {model}", f"{kind} {end}") for label, kind, _ in shown for model, end in (("base model", "pale"), ("now", "full"))
    ]
    grid = grid_of(value_marks, lambda value: HEIGHT - BOTTOM - up(value))
    return figure(title, note=note, legend=legend, grid=grid, ticks=names, axis="timestep (0: no noise)", bars=bars)


# -----------------------------------------------------------------------------
# The charts of a run


def charts_of(lines):
    """The charts of a metrics.jsonl: training, the scores on fixed noise, and speed."""
    losses = points_of(lines, "loss")
    window = max(10, len(losses) // 50)
    odd = sum(isinstance(line.get("loss"), float) and not math.isfinite(line["loss"]) for line in lines)
    newest = newest_score(lines)
    best = number(newest.get("best_step"))
    bands = [band for band in newest.get("eval_bands") or [] if isinstance(band, dict)]
    return [
        line_chart(
            "Training loss",
            [("as logged", "faint", losses), (f"running mean over about {window} lines", "one", running_mean(losses, window))],
            f"{odd} non-finite values are omitted." if odd else "",
        ),
        line_chart(
            "Loss on fixed noise",
            [
                ("training clips", "one", points_of(lines, "eval_train_loss")),
                ("base model", "one base", points_of(lines, "eval_train_base_loss")),
                ("held-out clips", "two", points_of(lines, "eval_held_out_loss")),
                ("base model on them", "two base", points_of(lines, "eval_held_out_base_loss")),
            ],
            mark=(best, f"best step: {best:.0f}") if best is not None else None,
        ),
        band_chart("Loss by timestep", bands, f"At step {newest['step']}." if newest else ""),
        line_chart("Learning rate", [("learning rate", "one", points_of(lines, "learning_rate"))]),
        line_chart("Gradient norm", [("before clipping", "one", points_of(lines, "grad_norm"))]),
        line_chart("Seconds per step", [("seconds", "one", points_of(lines, "seconds_per_step"))]),
        *video_charts(lines),
    ]


def video_charts(lines):
    """The charts of the validation videos, none without videos that were measured."""
    charts, moves, data = [], points_of(lines, "motion"), points_of(lines, "motion_data")
    if moves:
        ends = [(step, data[-1][1]) for step in (moves[0][0], moves[-1][0])] if data else []  # the same at every step
        series = [("videos", "one", moves), ("step 0", "one base", points_of(lines, "motion_base")), ("training clips", "two base", ends)]
        charts.append(line_chart("Motion of the videos", series, "Grey levels per second."))
    if without := points_of(lines, "moved_without_trigger"):
        series = [("with the trigger", "one", points_of(lines, "moved_with_trigger")), ("without it", "two", without)]
        charts.append(line_chart("Distance from step 0's video", series, "Mean difference in grey levels."))
    return charts


def newest_score(lines):
    """The newest line written by an evaluation, {} if there is none."""
    return next((line for line in reversed(lines) if "eval_train_loss" in line), {})


def newest_numbers(lines):
    """The newest evaluation as table rows (label, now, base model, change), and further facts of the newest lines."""
    newest, rows, facts = newest_score(lines), [], []
    for clips, name in (("training clips", "train"), ("held-out clips", "held_out")):
        now, base = number(newest.get(f"eval_{name}_loss")), number(newest.get(f"eval_{name}_base_loss"))
        if now is not None:
            change = f"{100 * (now - base) / base:+.1f} %" if base else ""
            rows.append((f"loss, {clips}", short(now), "" if base is None else short(base), change))
    if number(newest.get("update_share")) is not None:
        facts.append(f"the update is {100 * newest['update_share']:.3g} % of the weights it is added to")
    gap, base_gap = newest.get("eval_caption_gap"), newest.get("eval_caption_base_gap")
    if gap and base_gap:
        facts.append(f"with another clip's caption the loss is {100 * gap[0]:+.1f} % (base model: {100 * base_gap[0]:+.1f} %)")
    for name, text in (("data_wait_percent", "waiting for data {:.0f} % of a step"), ("peak_memory_gib", "peak memory {:.2f} GiB")):
        if points := points_of(lines, name):
            facts.append(text.format(points[-1][1]))
    return {"step": newest.get("step", ""), "rows": rows, "facts": facts}
