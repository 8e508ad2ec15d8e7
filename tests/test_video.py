"Video: exactly the frames that are in a file, at their own times, upright, with their sound; and files that end as they should."
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from poet_nb import config, video
from poet_nb.config import DataConfig, DataError, PoetError
from poet_nb.plot import person_color
from poet_nb.video import AudioCopy, Tracker, VideoFacts, VideoWriter, annotate_video, is_video, pose_similarity, predict_frames, read_video, read_webcam, ticks, upright, video_facts

av = pytest.importorskip("av")
MS, SMALL = Fraction(1, 1000), video.PredictOptions(data=DataConfig(eval_scale=32, max_size=64, pad_multiple=16))


def numbered(number: int, height: int = 48, width: int = 80) -> np.ndarray:
    "A grey picture with a number in its upper left corner: ten squares of 8 pixels, lowest bit first."
    image = np.full((height, width, 3), 90, np.uint8)
    for bit in range(10): image[:8, 8 * bit:8 * bit + 8] = 255 * (number >> bit & 1)
    return image


def number_of(image: np.ndarray) -> int: return sum(int(image[2:6, 8 * bit + 2:8 * bit + 6].mean() > 127) << bit for bit in range(10))


def make(path, times, images=None, codec="libx264", audio=None, turned=None, options=None, aspect=None, offset=0):
    "A video of numbered frames that are shown at `times`, milliseconds."
    images = [numbered(i) for i in range(len(times))] if images is None else images
    with av.open(str(path), "w") as file:
        stream, sound = file.add_stream(codec, rate=25, options=options or {}), file.add_stream(audio, rate=16000) if audio else None
        stream.height, stream.width, stream.pix_fmt, stream.codec_context.time_base = *images[0].shape[:2], "yuv420p", MS
        if turned and not hasattr(stream, "set_display_rotation"): pytest.skip("this PyAV can't write a rotation")
        if turned: stream.set_display_rotation(turned[0], hflip=turned[1])
        if aspect: stream.codec_context.sample_aspect_ratio = aspect
        if sound:
            sound.layout, wave = "mono", (8000 * np.sin(np.arange(16 * (times[-1] + 40)) / 6)).astype(np.int16)[None]
            heard = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            heard.sample_rate, heard.pts, heard.time_base = 16000, 16 * offset, Fraction(1, 16000)
            file.mux(sound.encode(heard) + sound.encode(None))
        for image, t in zip(images, times):
            frame = av.VideoFrame.from_ndarray(image)
            frame.pts, frame.time_base = t + offset, MS
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def shown(path) -> list: return [(number_of(f.image), round(1000 * f.time)) for f in read_video(path)]


def sound(path) -> list:
    "(time, bytes) of each packet of the sound."
    with av.open(str(path)) as file: return [(float(p.pts * p.time_base), bytes(p)) for p in file.demux(audio=0) if p.size]


def rewrite(source, path, **changes):
    with VideoWriter(path, video_facts(source)) as out:
        for frame in read_video(source): out.write(frame.image, frame.pts)
    return path


# ---- frames

@pytest.mark.parametrize("name, codec, options", [("a.mp4", "libx264", dict(bf="3", g="50")), ("b.mkv", "libx264", dict(bf="2", g="7")), ("c.avi", "mpeg4", dict(g="12")), ("d.ts", "libx264", dict(bf="2"))])
def test_every_frame_comes_once_in_order_at_its_time(tmp_path, name, codec, options):
    "Frames that refer to later ones (bf), and few whole pictures (g): where jumping programs get neighbours."
    times = [40 * i for i in range(60)]
    file = make(tmp_path / name, times, codec=codec, options=options)
    assert shown(file) == list(enumerate(times))
    assert [f.index for f in read_video(file)] == list(range(60))


def test_a_variable_rate_stays_as_it_is(tmp_path):
    times = [0, 20, 21, 100, 400, 401, 470, 2000]
    source = make(tmp_path / "phone.mp4", times)
    assert shown(source) == shown(rewrite(source, tmp_path / "copy.mp4")) == list(enumerate(times))


@settings(max_examples=4)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=12))
def test_any_times_come_back(tmp_path_factory, steps):
    folder, times = tmp_path_factory.mktemp("times"), [0, *np.cumsum(steps).tolist()]
    with VideoWriter(folder / "a.mp4", VideoFacts(MS, Fraction(25))) as out:
        for i, t in enumerate(times): out.write(numbered(i), t)
    assert shown(folder / "a.mp4") == list(enumerate(times))


@pytest.mark.parametrize("height, width", [(49, 81), (48, 81), (49, 80), (48, 80)])
def test_odd_sizes_are_padded_by_one_pixel(tmp_path, height, width):
    with VideoWriter(tmp_path / "a.mp4", VideoFacts(MS, Fraction(25))) as out:
        for i in range(3): out.write(numbered(i, height, width), 40 * i)
    frames = list(read_video(tmp_path / "a.mp4"))
    assert {f.image.shape for f in frames} == {(height + height % 2, width + width % 2, 3)} and [number_of(f.image) for f in frames] == [0, 1, 2]


def test_a_time_that_stands_still_or_is_missing():
    assert [ticks(0, 0, -1, 1), ticks(5, 0, 5, 1), ticks(3, 0, 5, 1), ticks(None, 7, 5, 40)] == [0, 6, 6, 45]
    assert ticks(-3, 0, -40, 40) == 0


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_telephones_of_all_eight_orientations(tmp_path, degrees, mirrored):
    "The picture is stored so that the note in the file brings it back: FFmpeg turns it against the clock first and mirrors it then."
    seen = [numbered(i) for i in range(3)]
    stored = [np.rot90(np.fliplr(image) if mirrored else image, -degrees // 90) for image in seen]
    file = make(tmp_path / "a.mp4", [0, 40, 80], [np.ascontiguousarray(image) for image in stored], turned=(degrees, mirrored))
    frames = list(read_video(file))
    assert [f.image.shape for f in frames] == [(48, 80, 3)] * 3
    assert [number_of(f.image) for f in frames] == [0, 1, 2]


def test_display_matrices_near_a_quarter_turn():
    image = np.arange(24).reshape(2, 4, 3)
    assert (upright(image, (3, -65536, 0, 65536, 3, 0, 0, 0, 1)) == np.rot90(image)).all() and upright(image) is image


def test_pixels_that_are_no_squares_stay_so(tmp_path):
    source = make(tmp_path / "a.mp4", [0, 40], aspect=Fraction(4, 3))
    assert video_facts(rewrite(source, tmp_path / "b.mp4")).aspect == video_facts(source).aspect == Fraction(4, 3)


def test_memory_does_not_grow_with_the_video(tmp_path, monkeypatch):
    "At no time are there more frames than a batch and what the decoder holds back."
    file, alive, most = make(tmp_path / "a.mp4", [40 * i for i in range(80)]), set(), []
    class Counted(video.Frame):
        def __init__(self, *args): super().__init__(*args); alive.add(id(self)); most.append(len(alive))
        def __del__(self): alive.discard(id(self))
    monkeypatch.setattr(video, "Frame", Counted)
    assert sum(1 for _ in predict_frames(Nobody(), read_video(file), replace(SMALL, batch_size=4))) == 80
    assert 4 <= max(most) <= 6


# ---- sound

@pytest.mark.parametrize("name, codec, audio", [("a.mp4", "libx264", "aac"), ("b.mkv", "libx264", "libmp3lame"), ("c.mkv", "libx264", "flac"), ("d.ts", "libx264", "aac")])
def test_sound_is_copied_to_the_bit(tmp_path, name, codec, audio):
    source = make(tmp_path / name, [40 * i for i in range(30)], codec=codec, audio=audio, offset=5000 if name == "d.ts" else 0)
    copy = rewrite(source, tmp_path / "copy.mp4")
    before, after = sound(source), sound(copy)
    if name == "d.ts":                                         # MP4 has no ADTS headers: they are in a transport stream only
        assert len(before) == len(after) and after[0][0] == pytest.approx(0, abs=.1)
        assert shown(copy)[0][1] <= 100
        with av.open(str(copy)) as file: assert sum(f.samples for f in file.decode(audio=0)) > 15000
    else:
        assert [b for _, b in before] == [b for _, b in after] and len(before) > 10
        assert [t for t, _ in before] == pytest.approx([t for t, _ in after], abs=.002)


def test_sound_that_the_container_does_not_take_is_left_out_with_a_warning(tmp_path):
    source = make(tmp_path / "old.avi", [40 * i for i in range(10)], codec="mpeg4", audio="adpcm_ms")
    with pytest.warns(UserWarning, match="old.avi.*adpcm_ms.*left out"): copy = rewrite(source, tmp_path / "copy.mp4")
    assert shown(copy) == shown(source) and video_facts(copy).source is None


def test_video_without_sound(tmp_path):
    source = make(tmp_path / "a.mp4", [0, 40, 80])
    assert video_facts(source).source is None and shown(rewrite(source, tmp_path / "b.mp4")) == shown(source)


# ---- faulty input

def test_faulty_files_are_named_with_a_remedy(tmp_path):
    good = make(tmp_path / "good.mp4", [40 * i for i in range(20)], audio="aac")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video\n" * 999)
    (tmp_path / "half.mp4").write_bytes(good.read_bytes()[:good.stat().st_size // 3])
    with av.open(str(tmp_path / "tone.m4a"), "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame) + stream.encode(None))
    for name, word in (("missing.mp4", "is the path right"), ("empty.mp4", "empty"), ("text.mp4", "neither an image nor a video"), ("half.mp4", "copied completely"), ("tone.m4a", "no moving pictures"), (".", "is the path right")):
        for read in (lambda f: next(read_video(f)), video_facts):
            with pytest.raises(DataError, match=word) as error: read(tmp_path / name)
            assert str(tmp_path / name) in str(error.value)


def test_a_codec_that_nobody_knows(tmp_path):
    file = make(tmp_path / "a.avi", [0, 40, 80], codec="mpeg4")
    file.write_bytes(file.read_bytes().replace(b"FMP4", b"QQQQ"))
    with pytest.raises(DataError, match="no decoder.*ffmpeg -i a.avi"): next(read_video(file))


def test_damage_in_the_middle_is_counted_and_the_rest_comes(tmp_path):
    times = [40 * i for i in range(40)]
    file = make(tmp_path / "a.mp4", times, options=dict(g="10", bf="0"))
    with av.open(str(file)) as container: places = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(file.read_bytes())
    for at, size in places[15:17]: data[at:at + size] = bytes(255 - b for b in data[at:at + size])
    file.write_bytes(data)
    with pytest.warns(UserWarning, match="a.mp4: [12] packets are damaged"): found = shown(file)
    assert 38 <= len(found) < 40 and found[:15] == list(enumerate(times))[:15] and found[-10:] == list(enumerate(times))[-10:]


def test_without_pyav_there_is_a_remedy(tmp_path, monkeypatch):
    def no(name): raise ImportError(name)
    monkeypatch.setattr(config, "import_module", no)
    with pytest.raises(PoetError, match="pip install 'av>=14'"): next(read_video(tmp_path / "a.mp4"))


def test_names_and_contents_that_are_videos(tmp_path):
    clip = make(tmp_path / "a.mp4", [0, 40])
    (tmp_path / "b").write_bytes(clip.read_bytes())
    cv2.imwrite(str(tmp_path / "c.png"), numbered(1))
    (tmp_path / "d").write_bytes((tmp_path / "c.png").read_bytes())
    assert [is_video(tmp_path / n) for n in ("a.mp4", "b", "c.png", "d", "E.MOV", "f.JPG")] == [True, True, False, False, True, False]


# ---- files that end as they should

class Nobody(torch.nn.Module):
    "Sees one person with joints in the corners, whatever it is shown."
    def __init__(self): super().__init__(); self.zero = torch.nn.Parameter(torch.zeros(1))
    def forward(self, samples):
        B = len(samples.tensors)
        corners = torch.linspace(-.5, .5, 17)[:, None].expand(17, 2)
        return dict(pred_logits=torch.tensor([[3., 0.]]).expand(B, 1, 2), pred_centers=torch.full((B, 1, 2), .5), pred_offsets=corners.expand(B, 1, 17, 2), pred_visibility=torch.ones(B, 1, 17), aux_outputs=[])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_done_can_be_played_and_its_sound_ends_with_it(tmp_path, error):
    times = [40 * i for i in range(30)]
    source = make(tmp_path / "a.mp4", times, audio="aac")
    def stop(frame, found):
        if frame.index == 11: raise error
    with pytest.raises(error): annotate_video(Nobody(), read_video(source), video_facts(source), tmp_path / "b.mp4", SMALL, each=stop)
    assert [t for _, t in shown(tmp_path / "b.mp4")] == times[:12]
    assert times[10] / 1000 < sound(tmp_path / "b.mp4")[-1][0] < times[13] / 1000
    assert cv2.VideoCapture(str(tmp_path / "b.mp4")).read()[0]                   # another reader can play it too


def test_only_so_many_frames(tmp_path):
    source = make(tmp_path / "a.mp4", [40 * i for i in range(30)], audio="aac")
    assert annotate_video(Nobody(), read_video(source), video_facts(source), tmp_path / "b.mp4", SMALL, max_frames=5) == 5
    assert len(shown(tmp_path / "b.mp4")) == 5 and sound(tmp_path / "b.mp4")[-1][0] < .3
    assert annotate_video(Nobody(), read_video(source), video_facts(source), None, SMALL, max_frames=99) == 30


def test_poses_are_drawn_where_they_are(tmp_path):
    source = make(tmp_path / "a.mp4", [0, 40, 80])
    annotate_video(Nobody(), read_video(source), video_facts(source), tmp_path / "b.mp4", SMALL)
    before, after = (np.stack([f.image for f in read_video(f)]).astype(int) for f in (source, tmp_path / "b.mp4"))
    changed = np.abs(after - before).max(-1) > 60
    assert changed.any((1, 2)).all()
    y, x = np.nonzero(changed[1])
    assert (np.abs(y / 48 - x / 80) < .3).mean() > .5                            # most near the diagonal from corner to corner


def test_a_writer_without_frames_makes_no_file(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", VideoFacts(MS, Fraction(25))): pass
    assert not (tmp_path / "a.mp4").exists()


# ---- tracks

FIGURE = torch.tensor([[0., 0.], [-10, 20], [10, 20], [-8, 60], [8, 60], [-8, 100], [8, 100]])


def people(places, order=None, labels=None, visibility=1.):
    "A prediction of people at some places (x, y), in some order."
    order = list(range(len(places))) if order is None else order
    poses = torch.stack([FIGURE + torch.tensor(places[i], dtype=torch.float32) for i in order]) if order else torch.zeros(0, 7, 2)
    labels = torch.zeros(len(places), dtype=torch.int64) if labels is None else torch.tensor(labels)
    return dict(scores=torch.linspace(.9, .5, len(order)), labels=labels[order], keypoints=torch.cat([poses, torch.full((len(order), 7, 1), visibility)], 2))


def numbers(tracker, *args, **more): return tracker(people(*args, **more))["tracks"].tolist()


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_numbers_stay_with_people_whatever_their_order(seed, n):
    rng, tracker = np.random.default_rng(seed), Tracker([.08] * 7)
    at, speed, first = rng.uniform(0, 60, (n, 2)) + 150 * np.arange(n)[:, None], rng.uniform(-4, 4, (n, 2)), None
    for frame in range(12):
        order = rng.permutation(n).tolist()
        found = people((at + frame * speed).tolist(), order)
        kept = {k: v.clone() for k, v in found.items()}
        out = tracker(found)
        assert found.keys() == kept.keys() and all(torch.equal(found[k], v) for k, v in kept.items()) and all(torch.equal(out[k], v) for k, v in kept.items())
        mine = dict(zip(order, out["tracks"].tolist()))
        first = first or mine
        assert mine == first and sorted(mine.values()) == list(range(1, n + 1))
    assert first == {i: k for k, i in enumerate(first, 1)}                       # the best score of the first frame is number 1


def test_people_who_walk_through_each_other_keep_their_numbers():
    tracker = Tracker([.08] * 7)
    seen = [numbers(tracker, [(10 + 6 * t, 0), (250 - 6 * t, 0)], [t % 2, 1 - t % 2]) for t in range(41)]
    assert all(tracks == [1, 2][::1 if t % 2 == 0 else -1] for t, tracks in enumerate(seen))


@pytest.mark.parametrize("gap, memory, same", [(0, 1, True), (4, 5, True), (5, 5, False), (24, 25, True), (25, 25, False)])
def test_who_comes_back_in_time_keeps_the_number(gap, memory, same):
    tracker = Tracker([.08] * 7, memory)
    assert numbers(tracker, [(0, 0), (300, 0)]) == [1, 2]
    for _ in range(gap): assert numbers(tracker, [(300, 0)]) == [2]                 # the other one is seen all the time
    assert numbers(tracker, [(0, 0), (300, 0)]) == [1 if same else 3, 2]
    for _ in range(gap): assert numbers(tracker, []) == []
    assert numbers(tracker, [(300, 0)]) == [2 if same else 4]


def test_somebody_who_is_covered_is_awaited_further_on():
    tracker = Tracker([.08] * 7)
    for t in range(30): assert numbers(tracker, [(8 * t, 0)]) == [1]
    for _ in range(10): tracker(people([]))
    assert numbers(tracker, [(8 * 40, 0)]) == [1]
    assert numbers(Tracker([.08] * 7), [(0, 0)]) == [1] and numbers(tracker, [(0, 0), (328, 0)]) == [2, 1]  # far away: somebody new


def test_kinds_are_not_taken_for_each_other():
    tracker = Tracker([.08] * 7)
    assert numbers(tracker, [(0, 0)], labels=[0]) == [1] and numbers(tracker, [(1, 0)], labels=[1]) == [2]
    assert numbers(tracker, [(1, 0), (0, 0)], labels=[1, 0]) == [2, 1]


def test_the_assignment_is_the_best_of_all_not_of_each():
    "The second person stands where the first one stood; taken one by one, the first pose would get the wrong number."
    tracker = Tracker([.3] * 7)
    assert numbers(tracker, [(0, 0), (12, 0)]) == [1, 2]
    assert numbers(tracker, [(11, 0), (24, 0)]) == [1, 2]


def test_joints_that_are_not_seen_count_only_where_none_is():
    before, after = (people([(0, 0)])["keypoints"].double() for _ in range(2))
    after[0, 0, 0] += 400
    before[0, 0, 2] = .4                                                          # the head, hidden, is somewhere else
    assert pose_similarity(before, after, [.08] * 7).tolist() == [[1.]]
    before[0, :, 2] = .4
    assert pose_similarity(before, after, [.08] * 7).item() == pytest.approx(6 / 7)
    assert pose_similarity(before, after + torch.tensor([0., 5, 0]), [.08] * 7).item() == pytest.approx(6 / 7 * np.exp(-25 / (2 * 50**2 * .16**2)))


def test_other_joints_are_refused():
    with pytest.raises(PoetError, match="7 joints.*17 sigmas"): Tracker([.08] * 17)(people([(0, 0)]))


def test_a_track_has_its_colour_and_tracks_can_be_switched_off(tmp_path, monkeypatch):
    "Two people whose scores change places in every frame: colours follow the person, or without tracks the score."
    source = make(tmp_path / "a.mp4", [40 * i for i in range(6)])
    found = [people([(10, 5), (60, 5)], [i % 2, 1 - i % 2]) for i in range(6)]
    colours, seen = [], []
    monkeypatch.setattr(video, "predict_frames", lambda model, frames, options: zip(frames, found))
    monkeypatch.setattr(video, "overlay_poses", lambda image, poses, skeleton, scores, colors, threshold: colours.append(colors) or image)
    skeleton = SimpleNamespace(sigmas=[.08] * 7)
    for track in (True, False): assert annotate_video(None, read_video(source), video_facts(source), tmp_path / "b.mp4", SMALL, skeleton, lambda _, f: seen.append(f), track=track) == 6
    assert colours == [[person_color(k) for k in (i % 2, 1 - i % 2)] for i in range(6)] + [None] * 6
    assert [f["tracks"].tolist() for f in seen[:6]] == [[1, 2], [2, 1]] * 3 and all("tracks" not in f for f in seen[6:])


# ---- webcam

class Camera:
    "Gives numbered frames, blue-green-red, until it is pulled out."
    frames, opened = 4, True
    def __init__(self, number): self.at, self.released = 0, False
    def isOpened(self): return self.opened
    def read(self):
        self.at += 1
        return self.at <= self.frames, numbered(self.at - 1) if self.at <= self.frames else None
    def release(self): type(self).released = True


def test_webcam_frames_have_the_times_of_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(video.cv2, "VideoCapture", Camera)
    clock = iter([10., 10.033, 10.0331, 10.2])
    monkeypatch.setattr(video, "time", SimpleNamespace(monotonic=lambda: next(clock, 11.)))
    annotate_video(Nobody(), read_webcam(0), video.WEBCAM, tmp_path / "cam.mp4", SMALL)
    assert [t for _, t in shown(tmp_path / "cam.mp4")] == [0, 33, 34, 200] and Camera.released


@pytest.mark.parametrize("change", [dict(opened=False), dict(frames=0)])
def test_webcam_that_gives_nothing(monkeypatch, change):
    monkeypatch.setattr(video.cv2, "VideoCapture", type("Broken", (Camera,), change))
    with pytest.raises(DataError, match="webcam 3"): next(read_webcam(3))


def test_webcam_colours(monkeypatch):
    "OpenCV gives blue-green-red, everything here is red-green-blue."
    blue = np.zeros((4, 4, 3), np.uint8); blue[..., 0] = 255
    monkeypatch.setattr(video.cv2, "VideoCapture", type("Blue", (Camera,), dict(read=lambda self: (True, blue))))
    assert next(read_webcam(0)).image[0, 0].tolist() == [0, 0, 255]


def test_frames_a_tick_of_the_file_apart_come_back(tmp_path):
    "1/90000 is finer than the encoder's time base: two neighbours must not become one."
    with VideoWriter(tmp_path / "a.mp4", VideoFacts(Fraction(1, 90000), Fraction(25))) as writer:
        for pts in range(10): writer.write(numbered(pts), pts)
    assert [number_of(f.image) for f in read_video(tmp_path / "a.mp4")] == list(range(10))


def test_what_goes_wrong_at_the_beginning_of_a_file_is_told(tmp_path, monkeypatch):
    def refuse(*_): raise PoetError("no encoder")
    monkeypatch.setattr(video, "add_h264", refuse)
    with pytest.raises(PoetError, match="no encoder"):
        with VideoWriter(tmp_path / "a.mp4", VideoFacts(MS, Fraction(25))) as writer: writer.write(numbered(0), 0)


def test_text_and_photographs_in_tiles_are_no_videos(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("words\n" * 200)
    with pytest.raises(DataError, match="notes.txt: neither an image nor a video"): next(read_video(tmp_path / "notes.txt"))
    file = make(tmp_path / "a.mp4", [0, 40])
    kind, opened = av.stream.Disposition, av.open
    class Tiled:                                                                   # as FFmpeg shows an iPhone's HEIC
        def __init__(self, inner): self.inner, self.format = inner, inner.format
        streams = SimpleNamespace(video=[SimpleNamespace(disposition=kind.dependent)])
        def __enter__(self): return self
        def __exit__(self, *_): self.inner.close()
    monkeypatch.setattr(av, "open", lambda *a, **k: Tiled(opened(*a, **k)))
    with pytest.raises(DataError, match="tiles"): next(read_video(file))


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    make(tmp_path / "b.mp4", [0, 40]).rename(tmp_path / "12:30.mp4")
    monkeypatch.chdir(tmp_path)
    assert [number for number, _ in shown("12:30.mp4")] == [0, 1]
