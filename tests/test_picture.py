"""What a viewer sees of a clip is what is trained on: values that can be worked out by hand. tests/test_picture_matrix.py compares
whole clips with ffmpeg."""

import subprocess
import zlib
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, ImageCms, features

from cogvideox import picture
from cogvideox.container import BadClip
from cogvideox.decode import Framing, read_clip
from tools import check_dataset

WHITE, BLACK, GREEN = (255, 255, 255), (0, 0, 0), (0, 128, 0)
BALL = "r=255:g='if({0},255,0)':b='if({0},0,255)':a='if({0},255,0)'".format("lt(hypot(X-30-N,Y-32),20)")  # yellow, on hidden magenta


def make(path, *options, source="testsrc2=s=96x64:r=8:d=2"):
    """Encode a test picture of ffmpeg's."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "lavfi", "-i", source, *map(str, options), path]
    subprocess.run(command, check=True, capture_output=True)
    return path


def framing(*sizes, **changes):
    return Framing(**{"fps": 8, "max_num_frames": 9, "sizes": sizes or ((64, 96),)} | changes)


# -----------------------------------------------------------------------------
# The shape of pixels, and edges that are not shown


@pytest.mark.parametrize("reader", ["auto", "pyav"])
def test_pixels_that_are_not_square_count_by_the_width_that_is_shown(reader, tmp_path):
    disc = "color=black:s=72x64:r=8:d=2,format=gray,geq=lum='255*lt(hypot((X-36)*16/9,Y-32),24)'"  # a circle only as 128x64
    clip = make(tmp_path / "a.mp4", "-vf", "setsar=16/9", "-pix_fmt", "yuv420p", source=disc)
    sizes = (64, 64), (64, 128)
    frames, facts = read_clip(clip, framing(*sizes), reader)
    assert (facts["source_width"], facts["source_height"], facts["cropped_percent"]) == (128, 64, 0.0)
    assert frames.shape[1:3] == (64, 128)  # the bucket of the shown shape
    assert facts["note"] == "16:9 pixels"
    bright = frames[0, :, :, 0] > 127
    assert abs(bright.any(axis=0).sum() - bright.any(axis=1).sum()) <= 3  # as wide as high
    cropped, facts = read_clip(clip, framing((64, 64)), reader)
    assert facts["cropped_percent"] == 50.0
    bright = cropped[0, :, :, 0] > 127
    assert abs(bright.any(axis=0).sum() - bright.any(axis=1).sum()) <= 3
    square = make(tmp_path / "b.mp4", "-vf", "setsar=0", "-pix_fmt", "yuv420p", source=disc)
    frames, facts = read_clip(square, framing(*sizes), reader)
    assert (frames.shape[1:3], facts["source_width"], facts["note"].startswith("16")) == ((64, 64), 72, False)


def test_a_turned_clip_turns_its_pixels_too(tmp_path):
    flat = make(tmp_path / "flat.mp4", "-vf", "setsar=2/1")
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90", "-i", flat, "-c", "copy", tmp_path / "up.mp4"],
        check=True,
    )
    _, facts = read_clip(tmp_path / "up.mp4", framing())
    assert (facts["source_width"], facts["source_height"]) == (64, 192)
    assert facts["box"][0] > 0 or facts["box"][1] > 0  # 96x64 of it


def with_clean_aperture(source, target, left, top, right, bottom):
    """An MP4 whose sample description hides edges, as a camera's does."""
    content = bytearray(source.read_bytes())
    entry = content.index(b"avc1", content.index(b"stsd")) - 4
    width, height = (int.from_bytes(content[entry + place : entry + place + 2]) for place in (32, 34))
    numbers = [width - left - right, 1, height - top - bottom, 1, left - right, 2, top - bottom, 2]
    box = (40).to_bytes(4) + b"clap" + b"".join(number.to_bytes(4, signed=True) for number in numbers)
    end = entry + int.from_bytes(content[entry : entry + 4])
    content[end:end] = box
    for place in [entry, *(content.rindex(kind, 0, entry) - 4 for kind in (b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov"))]:
        content[place : place + 4] = (int.from_bytes(content[place : place + 4]) + 40).to_bytes(4)
    target.write_bytes(content)
    return target


@pytest.mark.parametrize("reader", ["auto", "pyav"])
@pytest.mark.parametrize("name", ["clap.mp4", "clap.mkv", "codec.mp4"])
def test_edges_that_the_file_hides_are_not_trained_on(name, reader, tmp_path):
    whole = make(tmp_path / "whole.mp4", "-crf", "1")
    if name == "codec.mp4":
        make(tmp_path / name, "-crf", "1", "-bsf:v", "h264_metadata=crop_left=16:crop_top=8")
        box = np.s_[8:, 16:]
    else:
        source, box = with_clean_aperture(whole, tmp_path / "clap.mp4", 16, 8, 12, 0), np.s_[8:, 16:-12]
        if name == "clap.mkv":
            command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", source, "-c", "copy", tmp_path / name]
            subprocess.run(command, check=True)
    full, _ = read_clip(whole, framing(), reader)
    height, width = full[0][box].shape[:2]
    frames, facts = read_clip(tmp_path / name, framing((height, width)), reader)
    assert (facts["source_width"], facts["source_height"]) == (width, height)
    shown = np.stack([frame[box] for frame in full]).astype(int)
    assert np.abs(frames - shown).mean() < 3
    assert np.abs(frames - np.roll(shown, 16, axis=2)).mean() > 20  # another part of the picture is no match


# -----------------------------------------------------------------------------
# Fields and streams


def test_interlaced_frames_lose_their_combs(tmp_path):
    moving = "testsrc2=s=96x64:r=50:d=2,scroll=horizontal=0.05"
    combs = ["-vf", "tinterlace=interleave_top,setfield=tff", "-flags", "+ildct+ilme", "-crf", "1"]
    marked = make(tmp_path / "i.mp4", *combs, source=moving)
    unmarked = make(tmp_path / "p.mp4", "-vf", "tinterlace=interleave_top,setfield=prog", "-crf", "1", source=moving)

    def combing(clip):
        frames, facts = read_clip(clip, framing())
        return np.abs(np.diff(frames.astype(int), n=2, axis=1)).mean(), facts

    (smooth, facts), (combed, plain) = combing(marked), combing(unmarked)
    assert facts["note"] == "deinterlaced"
    assert plain["note"] == ""
    assert smooth < 0.6 * combed


@pytest.mark.parametrize("reader", ["auto", "pyav"])
def test_of_two_video_streams_one_is_surveyed_read_and_named(reader, tmp_path):
    blue = ["-f", "lavfi", "-i", "color=blue:s=192x128:r=8:d=2"]
    clip = make(tmp_path / "two.mp4", *blue, "-map", 0, "-map", 1, source="color=red:s=96x64:r=8:d=2")
    frames, facts = read_clip(clip, framing(), reader)
    is_red = frames[0, 0, 0, 0] > 200
    assert (facts["source_width"], is_red) in [(96, True), (192, False)]
    assert facts["note"].startswith(f"video stream {1 if is_red else 2} of 2")


# -----------------------------------------------------------------------------
# Transparency, and pictures that move

MOVING = {
    "ball.webm": ["-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-crf", 4, "-b:v", 0],
    "ball_vp8.webm": ["-c:v", "libvpx", "-pix_fmt", "yuva420p", "-auto-alt-ref", 0, "-crf", 4, "-b:v", "1M"],
    "ball.mov": ["-c:v", "prores_ks", "-profile:v", 4, "-pix_fmt", "yuva444p10le"],
    "ball.mkv": ["-c:v", "ffv1", "-pix_fmt", "bgra"],
    "ball.gif": ["-vf", f"geq={BALL},split[a][b];[a]palettegen[p];[b][p]paletteuse"],
    "ball.webp": ["-c:v", "libwebp_anim", "-lossless", 1],
    "ball.apng": ["-c:v", "apng", "-plays", 0],
    "ball.png": ["-c:v", "apng", "-plays", 0, "-f", "apng"],
}


def ball(path, *options):
    filters = [] if "-vf" in options else ["-vf", f"format=rgba,geq={BALL}"]
    return make(path, *filters, *options, source="color=c=magenta:s=96x64:r=8:d=2,format=rgba")


@pytest.mark.parametrize("name", MOVING)
def test_transparent_pixels_get_the_one_background_and_pictures_that_move_are_clips(name, tmp_path):
    clip = ball(tmp_path / name, *MOVING[name])
    for colour in (WHITE, BLACK, GREEN):
        frames, facts = read_clip(clip, framing(background=colour))
        assert frames.shape == (9, 64, 96, 3)
        assert np.abs(frames[:, :8].astype(int) - colour).max() <= 3  # what was hidden magenta
        assert np.abs(frames[0, 32, 30].astype(int) - (255, 255, 0)).max() <= 6
        yellow = (frames[..., 0] > 200) & (frames[..., 1] > 200) & (frames[..., 2] < 60)
        centres = [np.nonzero(frame)[1].mean() for frame in yellow]
        assert np.diff(centres) == pytest.approx(np.ones(8), abs=0.5)  # a pixel a frame, where colours may have half the pixels
        assert facts["note"].startswith("transparent over #{:02x}{:02x}{:02x}".format(*colour))
        assert facts["treatment"]["background"] == "#{:02x}{:02x}{:02x}".format(*colour)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_still_gets_the_same_background(mode, tmp_path):
    still = Image.new("RGBA", (96, 64), (255, 0, 255, 0))
    still.paste((255, 255, 0, 255), (0, 0, 48, 64))
    (still.convert(mode) if mode != "P" else still.quantize(4)).save(tmp_path / "a.png")
    frames, facts = read_clip(tmp_path / "a.png", framing(background=GREEN))
    assert np.abs(frames[0, :, 48:].astype(int) - GREEN).max() <= 1
    assert frames[0, 5, 5, 0] > 200
    assert facts["note"] == "transparent over #008000"
    still.convert("RGB").save(tmp_path / "b.png")
    frames, facts = read_clip(tmp_path / "b.png", framing(background=GREEN))
    assert (frames[0, 5, 90].tolist(), facts["note"], facts["treatment"]) == ([255, 0, 255], "", {})


def test_an_animation_keeps_the_time_that_each_of_its_pictures_stays(tmp_path):
    shades = [Image.new("RGB", (96, 64), (shade, shade, shade)) for shade in (0, 80, 160, 200)]
    shades[0].save(tmp_path / "a.webp", save_all=True, append_images=shades[1:], duration=[125, 1000, 125, 125], lossless=True)
    frames, facts = read_clip(tmp_path / "a.webp", framing())
    # At 8 frames a second: 0, then 80 for a second, until the eighth at whose end 160 comes.
    assert facts["indices"] == [0, 1, 1, 1, 1, 1, 1, 1, 2]
    assert frames[:, 0, 0, 0].tolist() == [0, 80, 80, 80, 80, 80, 80, 80, 160]
    evenly = [Image.new("RGB", (96, 64), (shade, shade, shade)) for shade in range(0, 90, 10)]
    evenly[0].save(tmp_path / "b.webp", save_all=True, append_images=evenly[1:], duration=125, lossless=True)
    assert read_clip(tmp_path / "b.webp", framing())[0][:, 0, 0, 0].tolist() == list(range(0, 90, 10))


def test_an_animated_avif_is_a_clip(tmp_path):
    shades = [Image.new("RGB", (96, 64), (shade, shade, shade)) for shade in (0, 60, 120, 180, 240)]
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    shades[0].save(tmp_path / "a.avif", save_all=True, append_images=shades[1:], duration=125, quality=100)
    frames, _ = read_clip(tmp_path / "a.avif", framing())
    assert frames[:, 0, 0, 0].tolist() == pytest.approx([0, 60, 120, 180, 240], abs=3)


def test_a_second_picture_in_a_photograph_is_no_clip(tmp_path):
    left, right = (Image.new("RGB", (96, 64), colour) for colour in ("red", "blue"))
    left.save(tmp_path / "stereo.jpg", format="MPO", save_all=True, append_images=[right])
    frames, _ = read_clip(tmp_path / "stereo.jpg", framing())
    assert frames.shape[0] == 1
    assert frames[0, 0, 0, 0] > 200


# -----------------------------------------------------------------------------
# Colours


def test_hdr_keeps_shadows_and_midtones_and_rolls_off_above():
    nits = np.array([0.5, 5.0, 26.0, 90.0, 203.0, 400.0, 1000.0])
    grey = np.repeat(picture.nits_to_pq(nits)[:, None], 3, axis=1)
    sdr = picture.to_sdr(grey, "PQ", 9, 1000.0)[:, 0]
    assert sdr[:4] == pytest.approx((nits[:4] / 203) ** (1 / 2.4), rel=0.02)  # below the knee as an SDR display of 203 nits shows it
    assert np.all(np.diff(sdr) > 0)
    assert sdr[4] == pytest.approx(0.9, abs=0.03)
    assert sdr[-1] == pytest.approx(1.0, abs=0.003)
    # A film graded no brighter than SDR's white needs no roll-off.
    assert picture.to_sdr(grey[4:5], "PQ", 9, 203.0)[0, 0] == pytest.approx(1.0, abs=1e-3)
    # HLG: 75 % of the signal is 203 nits on a display of 1000 (BT.2408), and the same grey as PQ's 203.
    assert picture.to_sdr(np.full((1, 3), 0.75), "HLG", 9, 1000.0)[0] == pytest.approx([sdr[4]] * 3, abs=0.005)


@pytest.mark.parametrize("primaries", [1, 9, 12])
def test_hdr_keeps_hues(primaries):
    linear = np.array([[50, 5, 5], [5, 50, 5], [5, 5, 50], [60, 60, 6]])  # nits of BT.709's primaries
    to_wide = np.linalg.solve(picture.to_xyz(picture.PRIMARIES[primaries]), picture.to_xyz(picture.PRIMARIES[1]))
    sdr = picture.to_sdr(picture.nits_to_pq(linear @ to_wide.T), "PQ", primaries, 1000.0)
    assert sdr == pytest.approx((linear / 203) ** (1 / 2.4), abs=0.01)


def hlg_codes(nits):
    """The inverse of BT.2100's HLG on a display of 1000 nits."""
    luminance = np.maximum(nits @ [0.2627, 0.6780, 0.0593] / 1000, 1e-6)[..., None]
    scene = nits / 1000 / luminance ** (0.2 / 1.2)
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-6)) + 0.55991073)


@pytest.mark.parametrize(("transfer", "code"), [("smpte2084", "PQ"), ("arib-std-b67", "HLG")])
def test_an_hdr_clip_looks_like_the_sdr_picture_that_it_was_made_from(transfer, code, tmp_path):
    source = "testsrc2=s=96x64:r=8:d=2,eq=saturation=0.6:contrast=0.7"
    original, _ = read_clip(make(tmp_path / "sdr.mkv", "-c:v", "ffv1", "-pix_fmt", "bgr0", source=source), framing())
    nits = 203 * (original / 255) ** 2.4 @ np.linalg.solve(picture.to_xyz(picture.PRIMARIES[9]), picture.to_xyz(picture.PRIMARIES[1])).T
    codes = picture.nits_to_pq(nits) if code == "PQ" else hlg_codes(nits)
    raw = np.round(65535 * codes).astype("<u2").tobytes()
    x265 = f"log-level=none:lossless=1:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", "96x64", "-r", "8", "-i", "-"]
    command += ["-vf", "scale=out_color_matrix=bt2020:out_range=tv,format=yuv444p10le", "-c:v", "libx265", "-x265-params", x265]
    subprocess.run([*command, tmp_path / "hdr.mp4"], input=raw, check=True)
    frames, facts = read_clip(tmp_path / "hdr.mp4", framing())
    assert facts["note"] == f"{code} to SDR"
    assert facts["treatment"]["tone_mapped"] == [code, 9, 1000.0]
    in_shadow = original.max(axis=-1) < 160  # 65 nits, below the knee
    assert in_shadow.mean() > 0.3
    assert np.abs(frames[in_shadow] - original[in_shadow].astype(int)).mean() < 3
    assert np.abs(frames - original.astype(int)).mean() < 12  # what is brighter is rolled off
    saturation = [(f.max(axis=-1).astype(int) - f.min(axis=-1)).mean() for f in (frames, original)]
    assert saturation[0] == pytest.approx(saturation[1], rel=0.1)
    untagged = tmp_path / "untagged.mp4"
    command[-1] = x265.replace(transfer, "bt709")
    subprocess.run([*command, untagged], input=raw, check=True)
    washed, facts = read_clip(untagged, framing())
    assert facts["note"] == ""
    assert np.abs(washed - original.astype(int)).mean() > 1.3 * np.abs(frames - original.astype(int)).mean()
    assert (washed.max(axis=-1).astype(int) - washed.min(axis=-1)).mean() < 0.8 * saturation[1]


def test_dolby_vision_without_another_layer_is_refused_by_name():
    frame = SimpleNamespace(color_trc=2, colorspace=2, side_data={"DOVI_METADATA": b"profile"})
    with pytest.raises(BadClip, match="Dolby Vision"):
        picture.treatment_of(frame, False)
    frame.color_trc = 1
    assert picture.treatment_of(frame, False) == ({}, [])


def test_a_photograph_with_a_colour_profile_is_shown_in_srgb(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = Image.new("RGB", (96, 64), (200, 60, 60))
    photo.save(tmp_path / "srgb.png", icc_profile=srgb)
    frames, facts = read_clip(tmp_path / "srgb.png", framing())
    assert (frames[0, 0, 0].tolist(), facts["note"]) == ([200, 60, 60], "")
    wide = swapped_primaries(srgb)
    photo.save(tmp_path / "swapped.png", icc_profile=wide)
    frames, facts = read_clip(tmp_path / "swapped.png", framing())
    assert frames[0, 0, 0].tolist() == pytest.approx([60, 200, 60], abs=3)
    assert facts["note"].endswith("to sRGB")
    photo.save(tmp_path / "broken.png", icc_profile=b"no profile")
    assert read_clip(tmp_path / "broken.png", framing())[0][0, 0, 0].tolist() == [200, 60, 60]


def swapped_primaries(profile):
    """A profile whose red is sRGB's green, and the other way round."""
    content = bytearray(profile)
    count = int.from_bytes(content[128:132])
    places = {bytes(content[132 + 12 * i : 136 + 12 * i]): 136 + 12 * i for i in range(count)}
    red, green = places[b"rXYZ"], places[b"gXYZ"]
    content[red : red + 8], content[green : green + 8] = content[green : green + 8], content[red : red + 8]
    content[84:100] = bytes(16)  # the identifier is a hash of the content
    return bytes(content)


# -----------------------------------------------------------------------------
# What the user is told


def test_the_check_names_what_is_changed_and_the_flag_chooses_the_background(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    still = Image.new("RGBA", (96, 64), (255, 0, 255, 0))
    still.save(tmp_path / "videos/a.png")
    (tmp_path / "prompts.txt").write_text("Nothing.\n")
    (tmp_path / "videos.txt").write_text("videos/a.png\n")
    flags = [str(tmp_path), "--sheet", str(tmp_path / "sheet.png"), "--encoding_cache_dir", str(tmp_path / "cache")]
    check_dataset.main([*flags, "--height", "64", "--width", "96", "--alpha_background", "navy"])
    assert "transparent over #000080" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        check_dataset.main([*flags, "--alpha_background", "see-through"])
    assert ended.value.code == 2
    assert "--alpha_background see-through: a colour without transparency" in capsys.readouterr().err


PQ_TAGS = ["-color_primaries", "bt2020", "-color_trc", "smpte2084", "-colorspace", "bt2020nc"]


def test_hdr_keeps_its_transparency(tmp_path):
    tags = "setparams=color_primaries=bt2020:color_trc=smpte2084:colorspace=bt2020nc:range=tv"
    options = ["-vf", f"format=rgba,geq={BALL},scale=out_color_matrix=bt2020,format=yuva444p10le,{tags}", "-c:v", "ffv1", *PQ_TAGS]
    frames, facts = read_clip(ball(tmp_path / "a.mkv", *options), framing(background=GREEN))
    assert facts["note"] == "PQ to SDR, transparent over #008000"
    assert np.abs(frames[:, :8].astype(int) - GREEN).max() <= 1
    assert frames[0, 32, 30, 0] > 200


def test_colours_that_change_inside_a_clip_are_refused(tmp_path):
    x265 = ["-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-x265-params"]
    make(tmp_path / "a.ts", *x265, "log-level=none", source="testsrc2=s=96x64:r=8:d=0.5")
    make(tmp_path / "b.ts", *x265, "log-level=none:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc")
    (tmp_path / "list.txt").write_text("file a.ts\nfile b.ts\n")
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-f",
        "concat",
        "-i",
        tmp_path / "list.txt",
        "-c",
        "copy",
        tmp_path / "c.mkv",
    ]
    subprocess.run(command, check=True)
    with pytest.raises(BadClip, match="its colours change at frame"):
        read_clip(tmp_path / "c.mkv", framing())
    assert read_clip(tmp_path / "b.ts", framing())[1]["note"].startswith("PQ to SDR")


def test_an_hdr_still_is_converted_or_refused_by_name(tmp_path):
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    still = ["-frames:v", 1, "-pix_fmt", "yuv444p10le", "-c:v", "libaom-av1", "-still-picture", 1, "-crf", 10]
    tags = "setparams=color_primaries=bt2020:color_trc=smpte2084:colorspace=bt2020nc:range=tv"
    _, facts = read_clip(make(tmp_path / "hdr.avif", "-vf", f"format=yuv444p10le,{tags}", *still, *PQ_TAGS), framing())
    assert facts["note"].startswith("PQ to SDR")
    assert read_clip(make(tmp_path / "sdr.avif", *still), framing())[1]["note"] == ""
    make(tmp_path / "plain.png", "-frames:v", 1)
    content = (tmp_path / "plain.png").read_bytes()
    chunk = b"cICP" + bytes([9, 16, 0, 1])
    (tmp_path / "hdr.png").write_bytes(content[:33] + (4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4) + content[33:])
    with pytest.raises(BadClip, match="an HDR picture"):
        read_clip(tmp_path / "hdr.png", framing())
    assert read_clip(tmp_path / "plain.png", framing())[1]["note"] == ""


def test_a_program_that_cannot_tell_the_cropping_is_named(tmp_path, monkeypatch):
    clip = make(tmp_path / "a.mp4")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")
    with pytest.raises(BadClip, match="IMAGEIO_FFMPEG_EXE"):
        read_clip(clip, framing())


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_a_small_part_of_a_picture_is_enough_to_apply_its_profile(mode, tmp_path):
    photo = Image.new("RGB", (96, 64), "white")
    photo.paste((200, 60, 60), (0, 0, 16, 16))
    profile = swapped_primaries(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (photo if mode == "RGB" else photo.quantize(8)).save(tmp_path / "a.png", icc_profile=profile)
    assert read_clip(tmp_path / "a.png", framing())[0][0, 4, 4].tolist() == pytest.approx([60, 200, 60], abs=3)
