"""The FLOP-matched benchmark: tokens and bytes are counted right, FLOPs match, and nothing is lost on interruption."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flop_matched import command, results
from benchmarks.flop_matched.jobs import CPU, ENTROPY, GPU, NGRAM_ENTROPY, PAIR, Job, Scale, Size, jobs_of
from benchmarks.flop_matched.models import TOLERANCE, VARIANTS, build, grow_latent, variant_flops
from benchmarks.flop_matched.noise import NOISES, noised
from benchmarks.flop_matched.profile import OTHER, parts_of
from benchmarks.flop_matched.run import Bench, OutOfTime
from benchmarks.flop_matched.speed import WARM_UP, full_rows, medians
from benchmarks.flop_matched.summary import SMOKE, realisation, realisation_line, summary, tables
from benchmarks.flop_matched.texts import SMALL_LANGUAGES, Texts, open_texts
from benchmarks.flop_matched.tokens import BPETokenizer
from benchmarks.flop_matched.training import best_rate
from benchmarks.machine import device_name, device_slug
from benchmarks.store import write_json
from blt_kernels import PatchLayout
from blt_kernels.data import Corpus
from blt_kernels.model import BLT, BLTConfig, EntropyModel, EntropyModelConfig, TransformerConfig
from blt_kernels.model.flops import token_flops
from blt_kernels.tokens import BOS_ID, BYTE_OFFSET, EOS_ID
from blt_kernels.training.evaluate import bits_per_byte, held_out_batches
from blt_kernels.training.patcher import Patcher
from blt_kernels.training.rows import RowShape

LOCAL = TransformerConfig(16, 1, 2, 32, window=16)
SIZE = Size(
    name="tiny",
    token=TransformerConfig(64, 2, 4, 160),
    blt=BLTConfig(LOCAL, TransformerConfig(16, 1, 2, 64), LOCAL, hash_rows=97, hash_dim=8),
    train_bytes=3000,
    main=("token", "blt-4.5"),
    seeds=1,
    ablations=("blt-4.5-ngram-entropy",),
    ablation_seeds=1,
    robust=("token",),
)
SCALE = Scale(
    name="cpu",
    smoke=True,
    sizes=(SIZE,),
    vocab_size=300,
    tokenizer_bytes=4000,
    entropy_model=EntropyModelConfig(LOCAL),
    entropy_train_bytes=2000,
    calibration_bytes=2000,
    sequence_bytes=128,
    batch_size=2,
    rates=(2e-3, 8e-3),
    tuning_share=0.4,
    warmup_share=0.1,
    evaluations=4,
    valid_bytes=500,
    test_bytes=500,
    document_bytes=200,
    language_bytes=100,
    throughput_seconds=0.01,
)
SAMPLE = "def f(x):\n    return x + 1  # größer als zuvor, 日本語 \U0001f600\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(40):
        text = f"# file {i}\n" + "".join(f"value_{j} = {i * j} + {j}\n" for j in range(5 + i))
        (folder / f"{i:02}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train([SAMPLE.encode() * 3, b"return return value value"], 300)


def open_tiny(folder: Path, out: Path) -> Texts:
    return open_texts(
        folder, None, out / ".work", valid_bytes=500, test_bytes=500, document_bytes=200, language_bytes=100
    )


def make_bench(folder: Path, out: Path, kind: type[Bench] = Bench) -> Bench:
    return kind(SCALE, open_tiny(folder, out), out, torch.device("cpu"), Console(quiet=True))


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """All jobs of the tiny scale, run without interruption."""
    bench = make_bench(folder, tmp_path_factory.mktemp("finished"))
    for job in jobs_of(SCALE):
        assert bench.run(job)
    return bench


# ---- tokens ----------------------------------------------------------------------------------------------------------


@given(st.text(max_size=60))
def test_tokens_give_the_text_back_and_count_its_bytes(text: str) -> None:
    tokenizer = BPETokenizer.train([SAMPLE.encode()], 280)
    tokens = tokenizer.encode(text.encode())
    assert tokenizer._tokenizer.decode([int(token) - BYTE_OFFSET for token in tokens[1:-1]]) == text
    assert tokenizer.token_bytes[tokens].sum() == len(text.encode())
    assert tokens[0] == BOS_ID and tokens[-1] == EOS_ID
    assert (tokens[1:-1] >= BYTE_OFFSET).all() and (tokens < tokenizer.vocab_size).all()


def test_merges_shorten_the_text_they_were_learned_on(tokenizer: BPETokenizer) -> None:
    assert 260 < tokenizer.vocab_size <= 300
    assert len(tokenizer.encode(b" return value")) <= 8 < len(b" return value") + 2


def test_a_tokenizer_is_the_same_each_time_and_from_its_file(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    again = BPETokenizer.train([SAMPLE.encode() * 3, b"return return value value"], 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = BPETokenizer.load(tmp_path / "tokenizer.json")
    for other in (again, loaded):
        assert other.encode(SAMPLE.encode()).tolist() == tokenizer.encode(SAMPLE.encode()).tolist()
        assert (other.token_bytes == tokenizer.token_bytes).all()


def test_a_vocabulary_has_room_for_all_bytes() -> None:
    with pytest.raises(ValueError, match="vocab_size: expected at least 260, got 259"):
        BPETokenizer.train([b"text"], 259)


def test_bits_per_byte_of_tokens_are_nats_over_bytes(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    documents = [SAMPLE.encode(), b"return value", "größer".encode()]
    for i, document in enumerate(documents):
        (tmp_path / f"{i}.txt").write_bytes(document)
    model = build(EntropyModelConfig(SIZE.token, tokenizer.vocab_size), seed=0)
    assert isinstance(model, EntropyModel)
    nats = 0.0
    for document in documents:
        tokens = torch.from_numpy(tokenizer.encode(document))
        losses = -model(tokens[None, :-1])[0].log_softmax(-1).gather(1, tokens[1:, None])
        nats += losses[:-1].sum().item()  # without EOS
    expected = nats / math.log(2) / sum(map(len, documents))
    held_out = held_out_batches(Corpus(tmp_path), RowShape(512, 512), tokenizer=tokenizer)
    bits, count = bits_per_byte(model, held_out)
    assert count == sum(map(len, documents))
    assert bits == pytest.approx(expected, rel=1e-5)


# ---- matching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [CPU, GPU], ids=lambda scale: scale.name)
def test_grown_models_match_within_two_per_cent(scale: Scale) -> None:
    for size in scale.sizes:
        target = token_flops(size.token, scale.vocab_size, 3.1, context_bytes=scale.sequence_bytes).forward
        parameters = []
        for name, variant in VARIANTS.items():
            owner = scale.entropy_models[NGRAM_ENTROPY if variant.ngram_entropy else ENTROPY]
            arguments: dict[str, Any] = {"context_bytes": scale.sequence_bytes, "entropy_model": owner}
            patch = variant.patch_size or 5.5
            base = size.blt if variant.ngrams else dataclasses.replace(size.blt, ngram_sizes=())

            def flops(config: BLTConfig, variant=variant, patch=patch, arguments=arguments) -> float:
                return variant_flops(variant, config, patch, **arguments).forward

            grown = grow_latent(base, target, flops, aspect=size.token.dim / size.token.num_layers)
            assert flops(grown) == pytest.approx(target, rel=TOLERANCE), name
            assert (grown.encoder, grown.decoder) == (base.encoder, base.decoder)
            if name in ("blt-4.5", "blt-6", "blt-8"):
                latent = grown.latent
                parameters.append(latent.num_layers * (4 * latent.dim**2 + 3 * latent.dim * latent.ffn_dim))
        assert parameters == sorted(parameters) and parameters[-1] > 1.3 * parameters[0]


def test_a_target_below_the_local_models_is_refused() -> None:
    with pytest.raises(ValueError, match="the smallest needs"):
        grow_latent(SIZE.blt, 1.0, lambda config: 100.0 + config.latent.ffn_dim, aspect=32)


def test_without_cross_attention_flops_are_what_is_computed() -> None:
    variant = VARIANTS["blt-4.5-no-cross-attention"]
    model = build(SIZE.blt, seed=0, cross_attention=False)
    tokens = torch.randint(4, 260, (1, 96))
    layout = PatchLayout.from_lengths(torch.full((1, 24), 4), 96)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, layout)
    expected = variant_flops(variant, SIZE.blt, 4, context_bytes=96, count="counter").forward
    assert counter.get_total_flops() / 96 == pytest.approx(expected, rel=0.01)


def test_without_cross_attention_all_is_used_and_nothing_leaks() -> None:
    model = build(dataclasses.replace(SIZE.blt, sparse_grad=False), seed=0, cross_attention=False)
    assert isinstance(model, BLT) and model.encoder_hash_tok_embedding is not None
    torch.nn.init.normal_(model.encoder_hash_tok_embedding.weight)  # a table of zeros would pass no gradient on
    tokens = torch.randint(4, 260, (1, 48))
    layout = PatchLayout.from_lengths(torch.full((1, 12), 4), 48)
    logits = model(tokens, layout)
    logits.square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert unused == []
    changed = tokens.clone()
    changed[0, 30] = 4 + (changed[0, 30] - 3) % 256
    different = (model(changed, layout) != logits).any(-1)[0]
    assert not different[:30].any() and different[30:].any()


# ---- noise and texts -------------------------------------------------------------------------------------------------


@given(st.text(min_size=1, max_size=50), st.sampled_from(sorted(NOISES)))
def test_noise_repeats_itself_is_utf8_and_never_empty(text: str, noise: str) -> None:
    result = noised(text.encode(), noise)
    assert result and result.decode() and result == noised(text.encode(), noise)


def test_noises_do_what_they_say() -> None:
    text = "".join(random.Random(0).choices("abcdefgh ij\n", k=20000))
    plain = text.encode()
    assert noised(b"ab c", "antspeak") == b"A B   C"
    assert noised(plain, "upper case").decode() == text.upper()
    assert len(noised(plain, "drop")) / len(plain) == pytest.approx(0.9, abs=0.01)
    # A fifth of the characters become 3 on average.
    assert len(noised(plain, "repeat")) / len(plain) == pytest.approx(1.4, abs=0.02)
    mixed = noised(plain, "random case").decode()
    assert mixed.lower() == text
    assert sum(map(str.isupper, mixed)) / sum(map(str.isalpha, mixed)) == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match="expected one of 'antspeak'"):
        noised(plain, "loud")


def test_splits_by_name_and_languages_are_respected(tmp_path: Path) -> None:
    data = tmp_path / "many"
    for language in ("aa", "bb"):
        for split in ("train", "valid", "test"):
            (data / language).mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"text": f"{language} {split} {i} " * 30}) for i in range(8)]
            (data / language / f"{split}.jsonl").write_text("\n".join(lines))
    texts = open_tiny(data, tmp_path / "out")
    assert all(b"train" in document for document in texts.train)
    assert all(b"valid" in document for document in texts.valid)
    assert {document[:2] for document in texts.train} == {b"aa", b"bb"}
    assert all(b"test" in document and len(document) <= 200 for document in texts.test["clean"])
    assert all(document.startswith(b"bb test") for document in texts.test["language bb"])
    assert texts.name == "many"


def test_a_part_of_other_text_is_held_out(folder: Path, tmp_path: Path) -> None:
    texts = open_tiny(folder, tmp_path)
    train, valid, test = (
        {document.splitlines()[0] for document in c} for c in (texts.train, texts.valid, texts.test["clean"])
    )
    assert train and valid and test and not (train & valid or train & test or valid & test)
    languages = {f"language {path.name}" for path in SMALL_LANGUAGES.iterdir()}
    assert set(texts.test) == {"clean", *NOISES, *languages} and len(languages) == 10
    assert open_tiny(folder, tmp_path).test["drop"].fingerprint() == texts.test["drop"].fingerprint()


# ---- jobs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [CPU, GPU, PAIR], ids=lambda scale: scale.name)
def test_every_job_has_a_name_of_its_own(scale: Scale) -> None:
    names = [job.name for job in jobs_of(scale)]
    assert len(set(names)) == len(names)
    assert scale.smoke == (scale.name != "gpu")


def untimed(value: Any) -> Any:
    """A result without what differs from run to run."""
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if key not in ("seconds", "machine")}
    return [untimed(item) for item in value] if isinstance(value, list) else value


class Interrupted(Bench):
    """Is interrupted at its 9th step."""

    calls = 0

    def check_time(self, reserve: float = 0) -> None:
        self.calls += 1
        if self.calls == 10:
            raise OutOfTime


def test_a_job_that_was_interrupted_ends_with_the_same_result(finished: Bench, folder: Path, tmp_path: Path) -> None:
    jobs = [job for job in jobs_of(SCALE) if job.kind in ("entropy", "tune")]
    bench = make_bench(folder, tmp_path)
    for job in jobs:
        bench.run(job)
    for job in [job for job in jobs_of(SCALE) if job.kind == "main"]:
        with pytest.raises(OutOfTime):
            make_bench(folder, tmp_path, Interrupted).run(job)
        partial = results.read(bench.path(job))
        assert partial is not None and not partial["finished"] and len(partial["curve"]) > 0
        assert make_bench(folder, tmp_path).run(job)
        assert untimed(results.read(bench.path(job))) == untimed(results.read(finished.path(job)))


def test_finished_jobs_are_skipped(finished: Bench, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.folder.glob("*.json")}
    again = make_bench(folder, finished.folder)
    assert len(before) == len(jobs_of(SCALE))
    assert not any(again.run(job) for job in jobs_of(SCALE))
    assert {path: path.stat().st_mtime_ns for path in finished.folder.glob("*.json")} == before


def test_results_without_the_working_files_are_enough_to_go_on(finished: Bench, folder: Path, tmp_path: Path) -> None:
    for path in finished.folder.glob("*.json"):
        shutil.copy(path, tmp_path)
    missing = tmp_path / "tiny-blt-4.5-seed0.json"
    missing.unlink()
    bench = make_bench(folder, tmp_path)
    assert [job.name for job in jobs_of(SCALE) if bench.run(job)] == [missing.stem]
    for name in (missing.name, "entropy-model.json"):
        assert untimed(results.read(tmp_path / name)) == untimed(results.read(finished.folder / name))


@pytest.mark.parametrize("text", ['{"format": 1, "jo', "[]", '{"format": 1}'])
def test_a_damaged_result_is_refused_by_name(text: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "entropy-model.json").write_text(text)
    with pytest.raises(ValueError, match=r"entropy-model\.json: damaged"):
        make_bench(folder, tmp_path).run(jobs_of(SCALE)[0])


def test_a_finished_result_has_all_that_the_report_shows(finished: Bench, tmp_path: Path) -> None:
    for job in jobs_of(SCALE):
        result = results.read(finished.path(job))
        assert result is not None
        for key in results.FINISHED[job.kind]:
            path = tmp_path / f"{job.name}.json"
            write_json(path, {name: value for name, value in result.items() if name != key})
            with pytest.raises(ValueError, match=rf"{job.name}\.json: damaged: it has no {key}"):
                results.read(path)


@pytest.mark.parametrize("damage", [{"machine": {}}, {"model": 1}, {"flops": []}, {"test": {}}, {"curve": []}])
def test_a_damaged_result_is_named(damage: dict[str, Any], finished: Bench, tmp_path: Path) -> None:
    result = results.read(finished.folder / "tiny-token-seed0.json")
    assert result is not None
    path = tmp_path / "tiny-token-seed0.json"
    write_json(path, result | damage)
    with pytest.raises(ValueError, match=rf"tiny-token-seed0\.json: damaged: .*{next(iter(damage))}"):
        results.read(path)


def test_results_of_other_text_are_refused(finished: Bench, folder: Path, tmp_path: Path) -> None:
    result = results.read(finished.folder / "entropy-model.json")
    assert result is not None
    result["data"] = {"name": "poems", "fingerprint": "0"}
    write_json(tmp_path / "entropy-model.json", result)
    with pytest.raises(ValueError, match=r"entropy-model\.json: made from other text \(poems\)"):
        make_bench(folder, tmp_path).run(jobs_of(SCALE)[0])


def test_a_model_waits_for_its_learning_rate(folder: Path, tmp_path: Path) -> None:
    bench = make_bench(folder, tmp_path)
    with pytest.raises(ValueError, match="token: its learning rate is not tuned yet"):
        bench.run(Job("tiny-token-seed0", "main", "tiny", "token"))


def test_models_train_on_equal_flops_and_are_tested_on_equal_bytes(finished: Bench) -> None:
    token, blt = (results.read(finished.folder / f"tiny-{name}-seed0.json") for name in SIZE.main)
    assert token is not None and blt is not None
    assert blt["flops"]["inclusive"] == pytest.approx(token["flops"]["inclusive"], rel=TOLERANCE)
    assert blt["flops"]["target"] == token["flops"]["inclusive"]
    for row in (token, blt):
        last = row["curve"][-1]
        assert last["step"] == row["training"]["steps"]
        assert last["training_flops"] == row["flops"]["training"] * last["bytes"]
        assert row["training"]["rate"] == best_rate(SCALE, finished.folder, SIZE, row["model"]["name"])
        assert last["valid_bits_per_byte"] < 8
    # Two rows of few and ragged documents: what the batches hold is known to a few per cent.
    assert blt["curve"][-1]["training_flops"] == pytest.approx(token["curve"][-1]["training_flops"], rel=0.15)
    assert (
        blt["test"]["clean"]["bytes"] == token["test"]["clean"]["bytes"] == sum(map(len, finished.texts.test["clean"]))
    )
    assert set(token["test"]) == set(finished.texts.test) and set(blt["test"]) == {"clean"}


def test_patches_of_the_benchmark_have_the_size_that_was_asked_for(finished: Bench) -> None:
    model = finished.model(SIZE, "blt-4.5")
    assert isinstance(model.patcher, Patcher) and model.unit_bytes == pytest.approx(4.5, rel=0.1)
    prompts, num_bytes = full_rows(finished.texts, SCALE, model)
    assert num_bytes == int((prompts >= BYTE_OFFSET).sum()) == SCALE.batch_size * SCALE.sequence_bytes
    assert np.array_equal(prompts[:, 0], np.full(SCALE.batch_size, BOS_ID))


def test_speed_is_measured_beside_the_token_model(finished: Bench) -> None:
    token, blt = (results.read(finished.folder / f"tiny-throughput-{name}.json") for name in SIZE.main)
    assert token is not None and blt is not None
    assert 0 < blt["measured"]["used_slots"] <= 1 and blt["measured"]["peak_memory_bytes"] > 0
    assert "twin" not in token and blt["twin"]["flops"] == token["flops"]
    assert blt["twin"]["measured"].keys() == token["measured"].keys()
    (line,) = realisation_line("cpu", [token, blt])
    ratio = f"{realisation(blt, 'train_bytes_per_second'):.2f}"
    assert f"cpu scale: {ratio} to {ratio} (tiny models)" in line
    assert f"at least {blt['measured']['used_slots']:.1%} of patches" in line
    assert realisation_line("cpu", [token]) == []


def test_calls_are_timed_in_turn() -> None:
    made: list[str] = []
    slow = lambda: (made.append("slow"), time.sleep(0.01))  # noqa: E731
    first, second = medians([slow, lambda: made.append("quick")], torch.device("cpu"), 0.0, 4)
    assert made == ["slow", "quick"] * (WARM_UP + 4)
    assert first >= 0.01 > second


def test_a_profile_knows_whose_backward_it_sees(finished: Bench) -> None:
    job = Job("tiny-profile", "profile", "tiny", "blt-4.5")
    finished.run(job)
    result = results.read(finished.path(job))
    assert result is not None
    blt, token = result["measured"]["blt"], result["measured"]["token"]
    assert {"hash embedding", "cross-attention", "attention over bytes, in windows", "loss"} <= blt["parts"].keys()
    assert "hash embedding" not in token["parts"] and "rotary positions" in token["parts"]
    assert blt["parts"][OTHER] < 0.5 * sum(blt["parts"].values()) and token["flops_per_second"]
    (table,) = (table for table in tables([result]) if "where a training step goes" in table.title)
    assert table.rows[-1][0] == "all" and any(row[0].startswith("products of width") for row in table.rows)


def test_parts_of_forward_and_backward_are_put_together() -> None:
    """A product costs twice as many FLOPs backward; its layer of width 48 is found there too."""
    layer, x = nn.Linear(48, 96, bias=False), torch.randn(200, 48, requires_grad=True)
    found = parts_of(lambda: layer(x).square().sum().backward())
    (part,) = (part for part in found["parts"] if part != OTHER)
    assert part == "products of width 48"
    flops = found["flops_per_second"][part] * found["parts"][part]
    assert flops == pytest.approx(3 * 2 * 200 * 48 * 96)


def test_flops_of_the_entropy_model_count_in_prefill_and_not_in_training() -> None:
    """In training it runs in the loader, so that its FLOPs do not count there."""
    measured = {"train_bytes_per_second": 1.0, "prefill_bytes_per_second": 1.0}
    token = {"flops": {"inclusive": 10.0, "training": 30.0, "components": {"head": 10.0}}, "measured": measured}
    components = {"head": 8.0, "entropy model": 2.0}
    blt = {"flops": {"inclusive": 10.0, "training": 26.0, "components": components}, "measured": measured}
    assert realisation(blt | {"twin": token}, "train_bytes_per_second") == pytest.approx(0.8)
    assert realisation(blt | {"twin": token}, "prefill_bytes_per_second") == pytest.approx(1.0)
    blt["measured"] = measured | {"compiled": measured | {"prefill_bytes_per_second": 2.0}}
    assert realisation(blt | {"twin": token}, "prefill_bytes_per_second") == pytest.approx(2.0)


def test_fused_and_reference_ops_train_alike(folder: Path, finished: Bench, tmp_path: Path) -> None:
    size = dataclasses.replace(SIZE, backend_steps=5)
    bench = Bench(
        dataclasses.replace(SCALE, sizes=(size,), rates=(4e-3,)),
        finished.texts,
        finished.folder,
        torch.device("cpu"),
        Console(quiet=True),
    )
    bench.folder = tmp_path
    (job,) = [job for job in jobs_of(bench.scale) if job.kind == "backends"]
    bench.run(job)
    result = results.read(tmp_path / f"{job.name}.json")
    assert result is not None and len(result["measured"]["fused"]["losses"]) == 5
    assert result["measured"]["largest_difference"] < 1e-3


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_a_smoke_test_says_so(
    finished: Bench, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "SCALES", {"cpu": SCALE})
    slug = device_slug(device_name(torch.device("cpu")))
    place = tmp_path / "[/INST]"  # which is no markup
    shutil.copytree(finished.folder, place / slug / "flop_matched" / SCALE.name)
    command.main(["--data", str(folder), "--out", str(place)])
    out = capsys.readouterr().out
    assert out.count(SMOKE) == 3 and "[/INST]" in out
    assert "quality at equal training FLOPs" in out and "FLOP realisation" in out


def test_a_long_run_does_not_claim_to_be_one(finished: Bench) -> None:
    rows = [json.loads(path.read_text()) | {"smoke": False} for path in finished.folder.glob("*.json")]
    console = Console(width=200, record=True, file=io.StringIO())
    summary(console, rows)
    assert SMOKE not in console.export_text()


def test_no_job_of_that_name_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--only", "nothing"])
    assert "no job of this scale has that in its name" in capsys.readouterr().err
