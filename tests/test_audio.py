"""Audio: framing and its inverse, what is read from real and made files, and what is refused."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import itertools
import re
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from pydantic import ValidationError

from imlbench import DataError, Sources
from imlbench_audio import spoken_digits
from imlbench_audio.etude import score, synthesize
from imlbench_audio.framing import chunked, frame, n_chunks, overlap_add, stretches
from imlbench_audio.recordings import read_recording, resample
from imlbench_audio.spoken_digits import SpokenDigits, SpokenDigitsParams
from imlbench_audio.violin import SynthViolin, SynthViolinParams, Violin, ViolinParams

HERE = Sources(offline=True)


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def tone(frequency: float, seconds: float, rate: int = 8000) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def dominant(signal: np.ndarray, rate: int = 8000) -> float:
    """Frequency of the highest peak of the spectrum, in Hz."""
    n = max(len(signal), 2 * rate)  # padded, for a resolution of 0.5 Hz
    spectrum = np.abs(np.fft.rfft(signal * scipy.signal.windows.blackman(len(signal)), n))
    return float(np.fft.rfftfreq(n, 1 / rate)[spectrum.argmax()])


# Framing


@pytest.mark.parametrize("n", [1, 399, 800, 801, 1200, 4567, 80000])
def test_chunks_are_windowed_pieces_of_the_signal(n):
    signal = noise(n)
    window = scipy.signal.get_window("hann", 800, fftbins=True)
    padded = np.concatenate([signal.numpy(), np.zeros(1600)])
    expected = [padded[start : start + 800] * window for start in range(0, max(1, n - 400), 400)]
    chunks = frame(signal)
    assert len(chunks) == n_chunks(n)
    assert chunks.dtype == torch.float32
    np.testing.assert_allclose(chunks.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("n", [800, 801, 1199, 1200, 1201, 4567, 80000])
def test_overlap_add_inverts_framing_where_two_windows_overlap(n):
    signal = noise(n)
    chunks = frame(signal)
    back = overlap_add(chunks)
    expected = np.zeros(400 * (len(chunks) + 1))
    for i, chunk in enumerate(chunks.double().numpy()):
        expected[400 * i : 400 * i + 800] += chunk
    np.testing.assert_allclose(back.numpy(), expected, atol=1e-6)
    interior = slice(400, min(n, 400 * len(chunks)))
    np.testing.assert_allclose(back[interior].numpy(), signal[interior].numpy(), atol=1e-6)


@pytest.mark.parametrize("n", [1, 800, 801, 1200, 1201])
def test_no_sample_is_dropped_and_no_chunk_is_padding_only(n):
    chunks = frame(torch.ones(n))
    window = torch.hann_window(800, dtype=torch.float64)
    fades = torch.ones(400 * (len(chunks) + 1), dtype=torch.float64)
    fades[:400], fades[-400:] = window[:400], window[400:]
    torch.testing.assert_close(overlap_add(chunks)[:n].double(), fades[:n], atol=1e-6, rtol=0)
    assert n <= 400 * (len(chunks) + 1)
    assert n == 1 or chunks.abs().sum(1).min() > 0


def test_gradients_of_both_directions_are_right():
    signal = noise(900).double().requires_grad_()
    overlap_add(frame(signal)).square().sum().backward()
    fades = overlap_add(frame(torch.ones(900)))[:900]
    torch.testing.assert_close(signal.grad, 2 * signal.detach() * fades**2, check_dtype=False)


@pytest.mark.parametrize("function", [frame, overlap_add])
@pytest.mark.parametrize("shape", [(0,), (), (2, 3), (0, 800), (1, 2, 800)])
def test_other_shapes_are_refused(function, shape):
    with pytest.raises(ValueError, match=r"must be of shape .*; got \("):
        function(torch.zeros(shape))


def test_recordings_keep_their_boundaries():
    examples = chunked([noise(2000, 1), noise(900, 2)])
    assert examples.lengths == (4, 2)
    torch.testing.assert_close(examples[4:], frame(noise(900, 2)))


def test_groups_are_stretches_of_two_seconds_within_recordings():
    n_seconds = [5, 0.3, 2.05]  # 99, 5 and 40 chunks
    examples = chunked([noise(round(seconds * 8000)) for seconds in n_seconds])
    assert examples.lengths == (99, 5, 40)
    truth = [*[0] * 40, *[1] * 40, *[2] * 19, *[3] * 5, *[4] * 40]
    assert examples.groups.tolist() == truth == stretches(examples.lengths).tolist()


def test_every_chunk_has_the_labels_of_its_recording():
    examples = chunked([noise(2000), noise(900)], {"speaker": [5, 3], "digit": [0, 9]})
    assert {name: label.tolist() for name, label in examples.labels.items()} == {
        "speaker": [5, 5, 5, 5, 3, 3],
        "digit": [0, 0, 0, 0, 9, 9],
    }


# Reading files


@pytest.mark.parametrize(
    ("suffix", "subtype", "rate"),
    [
        ("wav", "PCM_16", 44100),
        ("wav", "FLOAT", 11025),
        ("aiff", "PCM_24", 96000),
        ("flac", "PCM_16", 44100),
        ("ogg", "VORBIS", 44100),
        ("opus", "OPUS", 48000),
        ("mp3", "MPEG_LAYER_III", 44100),
    ],
)
def test_every_format_keeps_the_tone_and_the_duration(tmp_path, suffix, subtype, rate):
    path = tmp_path / f"Tön 1.{suffix}"
    left, right = tone(440, 2, rate), tone(1234, 2, rate) / 10
    container = "OGG" if suffix in ("ogg", "opus") else suffix
    samples = np.stack([left, right], axis=1)
    soundfile.write(path, samples, rate, format=container, subtype=subtype)
    signal = read_recording(path, "violin", 1)
    assert signal.dtype == torch.float32
    assert len(signal) == pytest.approx(16000, abs=1)
    assert signal.double().std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert dominant(signal.numpy()) == pytest.approx(440, abs=1)
    amplitude = 2 * np.abs(np.fft.rfft(signal.numpy())) / len(signal)
    at = lambda frequency: amplitude[round(frequency * len(signal) / 8000)]  # noqa: E731
    assert at(1234) / at(440) == pytest.approx(0.1, rel=0.05)  # both channels are in it


@pytest.mark.parametrize("rate", [4000, 8000, 11025, 16000, 22050, 44100, 48000])
def test_resampling_keeps_a_sine_in_place(rate):
    out = resample(tone(1000, 2, rate), rate)
    np.testing.assert_allclose(out[800:-800], tone(1000, 2)[800:-800], atol=1.5e-3)


@pytest.mark.parametrize("rate", [16000, 22050, 44100, 48000])
def test_resampling_suppresses_what_would_be_folded_back(rate):
    passed, folded = (resample(tone(f, 2, rate), rate)[800:-800].std() for f in (3400, 5000))
    assert 20 * np.log10(passed / 0.5 * 2**0.5) == pytest.approx(0, abs=0.1)
    assert 20 * np.log10(folded / 0.5 * 2**0.5) < -55


def test_an_offset_makes_no_clicks(tmp_path):
    np.testing.assert_allclose(resample(np.full(44100, 0.7), 44100), 0.7)


# What is refused


def damaged(content: bytes, how: str) -> bytes:
    half = len(content) // 2
    if how == "cut":
        return content[:half]
    return content[:half] + bytes(20_000) + content[half + 20_000 :]


@pytest.mark.parametrize(
    ("suffix", "how"),
    [(s, "cut") for s in ("wav", "aiff", "flac", "ogg", "opus", "mp3")]
    + [(s, "overwritten") for s in ("flac", "ogg", "opus", "mp3")],
)
def test_a_file_damaged_half_way_is_refused(tmp_path, suffix, how):
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"damaged.{suffix}"
    samples = noise(48000 * 12).numpy() / 10
    options = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
    soundfile.write(whole, samples, 48000, **options)
    assert len(read_recording(whole, "violin", 10)) == 96000
    path.write_bytes(damaged(whole.read_bytes(), how))
    expected = r"violin: .*damaged.* must decode to its end; got damage, after .* Copy it again"
    with pytest.raises(DataError, match=expected):
        read_recording(path, "violin", 10)


def test_a_wave_file_of_unknown_length_is_read(tmp_path):
    path = tmp_path / "piped.wav"
    soundfile.write(path, tone(440, 1), 8000)
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = b"\xff" * 4  # as programs that write to a pipe do
    path.write_bytes(content)
    assert len(read_recording(path, "violin", 1)) == 8000


NOT_AUDIO = {
    "text.wav": b"hello " * 1000,
    "text.mp3": b"hello " * 1000,
    "empty.wav": b"",
    "header.wav": b"RIFF\x00\x10\x00\x00WAVE",
    "bytes.raw": bytes(range(256)) * 10,
}


@pytest.mark.parametrize("name", NOT_AUDIO)
def test_a_file_that_is_not_audio_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(NOT_AUDIO[name])
    with pytest.raises(DataError, match=rf"violin: .*{name} must be audio \(WAV.*; got something"):
        load_violin(tmp_path / name)


SIGNALS = {
    "silence": (np.zeros(96000), "must hold sound.*; got silence"),
    "nearly silence": (tone(440, 12) * 1e-5, "must hold sound.*; got silence"),
    "an offset": (np.full(96000, 0.5), "must hold sound.*; got silence"),
    "opposite channels": (np.outer(tone(440, 12), [1, -1]), "must hold sound.*; got silence"),
    "too short": (tone(440, 9.99), "must last at least 10 s; got 9.99 s"),
    "nothing": (np.zeros(0), "must last at least 10 s; got 0 s"),
    "not numbers": (np.r_[np.nan, tone(440, 12)], "must hold finite numbers; got NaN"),
    "a silent end": (np.r_[tone(440, 10.8), np.zeros(9600)], r"must hold.*; got silence in test\."),
}


@pytest.mark.parametrize("case", SIGNALS)
def test_a_signal_that_cannot_be_used_is_refused(tmp_path, case):
    samples, message = SIGNALS[case]
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    with pytest.raises(DataError, match=rf"violin: .*a\.wav {message}") as caught:
        load_violin(tmp_path / "a.wav")
    assert len(caught.value.messages) == 1


def load_violin(path: Path):
    return Violin(ViolinParams(path=str(path))).load(HERE)


# Violin


def test_the_violin_is_cut_in_time(tmp_path):
    samples = 0.1 * noise(100_123).numpy()
    soundfile.write(tmp_path / "a.flac", samples, 8000, subtype="PCM_24")
    splits = load_violin(tmp_path / "a.flac")
    train, valid, test = (
        overlap_add(part[:]) for part in (splits.train, splits.valid, splits.test)
    )
    scaled = samples / samples.std()
    for part, start, end in ((train, 0, 80000), (valid, 80000, 90000), (test, 90000, 100_123)):
        inside = slice(start + 400, end - 400)
        np.testing.assert_allclose(part[400 : end - start - 400], scaled[inside], atol=1e-4)
    assert splits.train.lengths == (199,)
    assert splits.valid.lengths == (24,)
    assert splits.test.lengths == (25,)


def test_the_real_violin(data_dir):
    sources = Sources(data_dir, offline=True)
    splits = Violin(ViolinParams()).load(sources)
    assert [part.lengths for part in (splits.train, splits.valid, splits.test)] == [
        (2293,),
        (286,),
        (287,),
    ]  # 143.4 s
    named = next((data_dir / "violin").glob("*.mp3"))
    assert load_violin(named).fingerprint == splits.fingerprint
    assert splits.train[:].isfinite().all()


def test_the_first_audio_file_of_the_folder_is_taken(tmp_path):
    folder = tmp_path / "violin"
    folder.mkdir()
    (folder / ".a.wav").touch()
    (folder / "a.txt").touch()
    soundfile.write(folder / "c.wav", tone(300, 12), 8000)
    soundfile.write(folder / "B.WAV", tone(600, 12), 8000)
    splits = Violin(ViolinParams()).load(Sources(tmp_path))
    assert dominant(overlap_add(splits.train[:]).numpy()) == pytest.approx(600, abs=1)


@pytest.mark.parametrize("exists", [True, False])
def test_without_a_recording_the_remedy_is_named(tmp_path, monkeypatch, exists):
    monkeypatch.delenv("IMLBENCH_DATA", raising=False)
    if exists:
        (tmp_path / "violin").mkdir()
    with pytest.raises(DataError, match=r"nothing to download: put .* violin\.path.*synth-violin"):
        Violin(ViolinParams()).load(Sources(tmp_path))


@pytest.mark.parametrize("name", ["no.wav", "."])
def test_a_path_without_a_file_is_named(tmp_path, name):
    with pytest.raises(DataError, match=r"violin: .* must be a readable file; got '"):
        load_violin(tmp_path / name)


# Synthetic violin


def test_the_synthetic_violin_is_deterministic_and_leaves_global_states_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    dataset = SynthViolin(SynthViolinParams(seconds=20))
    first, second = dataset.load(HERE), dataset.load(HERE)
    assert first.fingerprint == second.fingerprint
    assert [part.lengths for part in (first.train, first.valid, first.test)] == [
        (319,),
        (39,),
        (39,),
    ]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_the_synthetic_violin_plays_its_score_in_tune():
    sound, start = synthesize(12, np.random.default_rng(3)), 0.0
    for note in itertools.islice(score(), 8):
        middle = sound[round((start + 0.06) * 8000) : round((start + note.seconds - 0.03) * 8000)]
        harmonic = dominant(middle) / (440 * 2 ** ((note.pitch - 69) / 12))
        assert harmonic == pytest.approx(max(1, round(harmonic)), rel=0.02), note
        start += note.seconds


def test_the_synthetic_violin_is_no_silence_and_not_clipped():
    sound = synthesize(120, np.random.default_rng(0))
    assert sound.shape == (960_000,)
    assert np.abs(sound).max() < 1
    loudness = sound.reshape(-1, 4000).std(axis=1)
    assert loudness.min() > 0.02
    assert np.abs(np.diff(sound)).max() < 1  # no clicks


# Spoken digits


@pytest.fixture(scope="module")
def all_digits(data_dir):
    return SpokenDigits(SpokenDigitsParams()).load(Sources(data_dir, offline=True))


def test_the_official_split(data_dir, all_digits):
    splits = all_digits
    assert [len(part.lengths) for part in (splits.train, splits.valid, splits.test)] == [
        1000,
        270,
        300,
    ]
    # The first ten for testing are zero to nine by the first speaker, each scaled by itself.
    start = 0
    for digit, length in enumerate(splits.test.lengths[:10]):
        path = data_dir / f"spoken-digits/recordings/{digit}_george_0.wav"
        truth, rate = soundfile.read(path)
        assert rate == 8000
        found = overlap_add(splits.test[start : start + length])
        end = 400 * length
        np.testing.assert_allclose(
            found[400:end][: len(truth) - 400], (truth / truth.std())[400:end], atol=1e-5
        )
        start += length


def test_labels_are_those_of_the_file_names(data_dir, all_digits):
    names = [path.stem for path in (data_dir / "spoken-digits/recordings").glob("*_[0-4].wav")]
    parts = sorted((int(i), speaker, int(digit)) for digit, speaker, i in map(_split_name, names))
    speakers = ["george", "jackson", "lucas", "nicolas", "theo", "yweweler"]
    test = all_digits.test
    assert sorted({speaker for _, speaker, _ in parts}) == speakers
    truth = [[speakers.index(speaker), digit] for _, speaker, digit in parts]
    found = torch.stack([test.labels["speaker"], test.labels["digit"]], dim=1)
    starts = np.cumsum([0, *test.lengths[:-1]])
    assert found[starts].tolist() == truth
    assert torch.equal(found, found[starts].repeat_interleave(torch.tensor(test.lengths), dim=0))


def _split_name(name: str) -> list[str]:
    return name.split("_")


def test_the_splits_share_no_recording(data_dir, all_digits):
    seen = set()
    for part in (all_digits.train, all_digits.valid, all_digits.test):
        for chunks in part[:].split(part.lengths):
            seen.add(hashlib.sha256(chunks.numpy().tobytes()).digest())
    assert len(seen) == 1570


def test_a_smaller_training_set_is_the_beginning_of_a_larger_one(data_dir):
    load = functools.partial(load_digits, data_dir, digits=[0])
    large, small, other = load(), load(n_train=20), load(n_train=20, split_seed=1)
    n = sum(small.train.lengths)
    assert small.train.lengths == large.train.lengths[:20]
    assert torch.equal(small.train[:], large.train[:n])
    assert small.valid.digest() == large.valid.digest() != other.valid.digest()
    assert small.test.digest() == other.test.digest()
    assert [len(part.lengths) for part in (large.train, large.valid, large.test)] == [243, 27, 30]


def test_digits_and_speakers_can_be_chosen(data_dir):
    splits = load_digits(data_dir, digits=[1, 6], speakers=["theo"])
    parts = (splits.train, splits.valid, splits.test)
    assert [len(part.lengths) for part in parts] == [81, 9, 10]


def load_digits(folder: Path, **params):
    return SpokenDigits(SpokenDigitsParams(**params)).load(Sources(folder, offline=True))


FREQUENCIES = ((300, 600), (900, 1200))
"""In Hz, of the made-up recordings: by digit and by speaker."""


@pytest.fixture
def some_digits(tmp_path, monkeypatch):
    """A folder of recordings: zeros and ones by two speakers, eight each."""
    monkeypatch.delenv("IMLBENCH_DATA", raising=False)
    folder = tmp_path / "data" / "spoken-digits" / "recordings"
    folder.mkdir(parents=True)
    for digit in (0, 1):
        for i, speaker in enumerate(("jackson", "theo")):
            for index in range(8):
                seconds = 0.2 + 0.05 * digit + 0.03 * i + 0.01 * index
                path = folder / f"{digit}_{speaker}_{index}.wav"
                soundfile.write(path, tone(FREQUENCIES[digit][i], seconds), 8000)
    return tmp_path / "data"


def test_any_part_of_the_recordings_will_do(some_digits):
    before = torch.get_rng_state()
    splits = load_digits(some_digits)
    assert [len(part.lengths) for part in (splits.train, splits.valid, splits.test)] == [11, 1, 20]
    assert load_digits(some_digits).fingerprint == splits.fingerprint
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_follow_the_recordings_into_every_split(some_digits):
    splits = load_digits(some_digits)
    for part in (splits.train, splits.valid, splits.test):
        labels = torch.stack([part.labels["digit"], part.labels["speaker"]], dim=1)
        for chunks, label in zip(
            part[:].split(part.lengths), labels.split(part.lengths), strict=True
        ):
            digit, speaker = label[0].tolist()
            assert (label == label[0]).all()
            heard = dominant(overlap_add(chunks).numpy())
            assert heard == pytest.approx(FREQUENCIES[digit][speaker], abs=10)


def test_a_speaker_has_the_same_number_whoever_else_is_chosen(some_digits):
    splits = load_digits(some_digits, speakers=["theo"])
    assert set(splits.test.labels["speaker"].tolist()) == {1}  # after jackson


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"speakers": ["teo"]}, "speakers must be .*; got 'teo'. Did you mean 'theo'? Known: jack"),
        ({"speakers": ["x"]}, "speakers must be of .*; got 'x'. Known: jackson, theo."),
        ({"digits": [1, 7]}, "digits must be of those in .*; got '7'. Known: 0, 1."),
    ],
)
def test_a_digit_or_speaker_that_does_not_exist(some_digits, params, message):
    with pytest.raises(DataError, match=f"spoken-digits: {message.replace('?', '[?]')}"):
        load_digits(some_digits, **params)


@pytest.mark.parametrize(
    "params", [{"digits": [10]}, {"digits": []}, {"speakers": []}, {"n_train": 0}]
)
def test_parameters_are_validated_before_anything_is_read(params):
    with pytest.raises(ValidationError):
        SpokenDigitsParams(**params)


def test_a_bad_recording_is_named(some_digits):
    path = some_digits / "spoken-digits/recordings/0_theo_0.wav"
    content = path.read_bytes()
    for samples, message in (
        (tone(300, 0.0995), r"must last at least 0\.1 s; got 0\.0995 s"),
        (np.zeros(2000), "must hold sound below 4 kHz; got silence"),
    ):
        soundfile.write(path, samples, 8000)
        with pytest.raises(DataError, match=rf"spoken-digits: .*0_theo_0\.wav {message}"):
            load_digits(some_digits)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"spoken-digits: .*0_theo_0\.wav must decode to its end"):
        load_digits(some_digits)


def test_recordings_of_another_name_are_named(some_digits):
    folder = some_digits / "spoken-digits/recordings"
    (folder / "zero.wav").touch()
    (folder / "._0_theo_0.wav").touch()  # as some systems add
    with pytest.raises(DataError, match=r"must hold recordings named .*; got zero\.wav\. Put"):
        load_digits(some_digits)


def test_an_empty_folder_and_an_empty_split_are_named(some_digits):
    folder = some_digits / "spoken-digits/recordings"
    for path in folder.glob("*_[5-7].wav"):
        path.unlink()
    with pytest.raises(DataError, match=r"must have at least one .* and two others.* got 20 and 0"):
        load_digits(some_digits)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"must hold recordings named .*; got none\. Put"):
        load_digits(some_digits)


def test_missing_digits_offline_say_where_was_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("IMLBENCH_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError) as caught:
        load_digits(tmp_path / "here")
    for part in ("spoken-digits/recordings not found", "here", "elsewhere", "without --offline"):
        assert part in caught.value.messages[0]


@pytest.fixture
def release(some_digits, tmp_path, monkeypatch):
    """A local server that offers the recordings as GitHub does; returns the archive's path."""
    recordings = some_digits / "spoken-digits/recordings"
    archive = tmp_path / "served" / "v1.0.10.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(recordings, "free-spoken-digit-dataset-1.0.10/recordings")
        for name in ("README.md", "../../evil.py"):
            tar.addfile(tarfile.TarInfo(f"free-spoken-digit-dataset-1.0.10/{name}"), io.BytesIO())
    handler = functools.partial(_Quiet, directory=str(archive.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = False  # so that closing the server waits for them
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
    monkeypatch.setattr(spoken_digits, "URL", url)
    sha256 = spoken_digits.content_sha256(recordings)
    monkeypatch.setattr(spoken_digits, "CONTENT_SHA256", sha256)
    yield archive
    server.shutdown()
    server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def test_digits_are_downloaded_into_the_cache_once(release, some_digits):
    dataset = SpokenDigits(SpokenDigitsParams())
    first = dataset.load(Sources())
    release.unlink()
    assert first.fingerprint == dataset.load(HERE).fingerprint
    assert first.fingerprint == load_digits(some_digits).fingerprint
    folder = Sources().cache_dir / "spoken-digits"
    assert [path.name for path in folder.iterdir()] == ["recordings"]  # and nothing half done
    assert len(list((folder / "recordings").iterdir())) == 32


@pytest.mark.parametrize(
    ("how", "reason"),
    [("gone", "404"), ("cut", "."), ("text", "."), ("other", "SHA-256 must be 0000; got")],
)
def test_a_failed_download_is_one_clear_message(release, monkeypatch, how, reason):
    if how == "gone":
        release.unlink()
    elif how == "other":
        monkeypatch.setattr(spoken_digits, "CONTENT_SHA256", "0000")
    else:
        content = release.read_bytes()
        release.write_bytes(content[: len(content) // 2] if how == "cut" else b"<html>" * 100)
    message = rf"recordings not found; .*Download failed \(.*{reason}.*Unpack .* --data-dir"
    with pytest.raises(DataError, match=message):
        SpokenDigits(SpokenDigitsParams()).load(Sources())
    assert Sources().find("spoken-digits/recordings") is None


def test_the_pinned_content_is_that_of_the_real_recordings(data_dir):
    folder = data_dir / "spoken-digits/recordings"
    if len(list(folder.glob("*.wav"))) != 3000:
        pytest.skip("needs all 3,000 recordings")
    assert re.fullmatch("[0-9a-f]{64}", spoken_digits.CONTENT_SHA256)
    assert spoken_digits.content_sha256(folder) == spoken_digits.CONTENT_SHA256
