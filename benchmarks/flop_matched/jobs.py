"""What is run at each scale: sizes, budgets, and the list of jobs that follows from them."""

from __future__ import annotations

import dataclasses

from blt_kernels.model import BLTConfig, EntropyModelConfig, TransformerConfig

from .models import TOKEN, VARIANTS

ENTROPY, NGRAM_ENTROPY = "entropy-model", "ngram-entropy-model"
# n-gram tables learn at a fixed multiple of the dense learning rate: one number is tuned for every model.
TABLE_RATE = 8.0
# The optimiser that the multiple was chosen for. Committed results were made with it, whatever training's default is.
TABLE_OPTIMIZER = "sparse_adam"


@dataclasses.dataclass(frozen=True)
class Size:
    """A FLOP class.

    Attributes:
        token: the shape of the token model, whose inclusive FLOPs per byte every BLT of the class matches.
        blt: the local models and tables of its BLTs; of the latent model the head size counts, the rest is grown.
        train_bytes: what the token model reads in a run. Its training FLOPs are the budget of every model.
        main, ablations: models by name, each run with its number of seeds; learning rates are tuned for the main ones.
        robust: those of them that are also evaluated under noise and on other languages (seed 0).
        backend_steps: steps of the comparison of fused with reference ops; 0: none.
        profiled: the training steps of the BLT of 4.5 bytes and of the token model are profiled.
    """

    name: str
    token: TransformerConfig
    blt: BLTConfig
    train_bytes: int
    main: tuple[str, ...]
    seeds: int
    ablations: tuple[str, ...] = ()
    ablation_seeds: int = 0
    robust: tuple[str, ...] = ()
    backend_steps: int = 0
    profiled: bool = False


@dataclasses.dataclass(frozen=True)
class Scale:
    """A preset.

    Attributes:
        smoke: the runs are too short for their quality to mean anything, and the output says so.
        vocab_size: of the BPE tokenizer, which is trained on `tokenizer_bytes`.
        sequence_bytes, batch_size: bytes of text in the longest sequence, and how many of these a batch holds; the same
            for every model.
        rates: learning rates that are tried, each with `tuning_share` of the budget. A single one is taken as it is.
        evaluations: points of a curve.
    """

    name: str
    smoke: bool
    sizes: tuple[Size, ...]
    vocab_size: int
    tokenizer_bytes: int
    entropy_model: EntropyModelConfig
    entropy_train_bytes: int
    calibration_bytes: int
    sequence_bytes: int
    batch_size: int
    rates: tuple[float, ...]
    tuning_share: float
    warmup_share: float
    evaluations: int
    valid_bytes: int
    test_bytes: int
    document_bytes: int
    language_bytes: int
    throughput_seconds: float

    @property
    def entropy_models(self) -> dict[str, EntropyModelConfig]:
        """The entropy models by name: the one of the scale, and tables of n-grams in place of its layers."""
        shape = dataclasses.replace(self.entropy_model.transformer, num_layers=0)
        ngram_sizes = EntropyModelConfig.preset("ngram").ngram_sizes
        return {ENTROPY: self.entropy_model, NGRAM_ENTROPY: EntropyModelConfig(shape, ngram_sizes=ngram_sizes)}


@dataclasses.dataclass(frozen=True)
class Job:
    """One JSON file.

    Attributes:
        name: the file's name, without suffix.
        kind: "entropy", "tune", "main", "ablation", "throughput", "profile" or "backends".
        model: "token", a name of VARIANTS, or one of the scale's entropy models.
        rate: the learning rate, of a tuning run.
    """

    name: str
    kind: str
    size: str
    model: str
    seed: int = 0
    rate: float | None = None


def entropy_job(name: str) -> Job:
    """The job that trains an entropy model of the scale."""
    return Job(name, "entropy", "", name)


def jobs_of(scale: Scale) -> list[Job]:
    """The jobs of a scale, in an order in which each finds what it needs."""
    cut = {name for size in scale.sizes for name in (*size.main, *size.ablations) if name != TOKEN}
    names = [ENTROPY, *([NGRAM_ENTROPY] if any(VARIANTS[name].ngram_entropy for name in cut) else [])]
    jobs = [entropy_job(name) for name in names]
    for size in scale.sizes:
        if len(scale.rates) > 1:
            for model in size.main:
                jobs += [
                    Job(f"{size.name}-tune-{model}-rate{rate:g}", "tune", size.name, model, rate=rate)
                    for rate in scale.rates
                ]
        for kind, models, seeds in (("main", size.main, size.seeds), ("ablation", size.ablations, size.ablation_seeds)):
            jobs += [
                Job(f"{size.name}-{model}-seed{seed}", kind, size.name, model, seed=seed)
                for seed in range(seeds)
                for model in models
            ]
        jobs += [
            Job(f"{size.name}-throughput-{model}", "throughput", size.name, model)
            for model in (*size.main, *size.ablations)
        ]
        if size.profiled:
            jobs.append(Job(f"{size.name}-throughput-profile", "profile", size.name, "blt-4.5"))
        if size.backend_steps:
            jobs.append(Job(f"{size.name}-backends", "backends", size.name, "blt-4.5"))
    return jobs


def _blt(local: TransformerConfig, decoder_layers: int, head: int, rows: int, hash_dim: int | None) -> BLTConfig:
    return BLTConfig(
        encoder=local,
        latent=TransformerConfig(2 * head, 1, 2, 64),
        decoder=dataclasses.replace(local, num_layers=decoder_layers),
        hash_rows=rows,
        hash_dim=hash_dim,
    )


ALL = (TOKEN, "blt-4.5", "blt-6", "blt-8", "blt-spaces", "blt-fixed-6")
ABLATIONS = ("blt-4.5-ngram-entropy", "blt-4.5-no-ngrams", "blt-4.5-no-cross-attention")

CPU_SMALL = Size(
    name="small",
    token=TransformerConfig(128, 4, 4, 352),
    blt=_blt(TransformerConfig(64, 1, 2, 176, window=64), 1, 32, 16381, 32),
    train_bytes=320_000,
    main=ALL,
    seeds=3,
    ablations=ABLATIONS,
    ablation_seeds=1,
    robust=(TOKEN, "blt-4.5"),
    backend_steps=20,
)
CPU_MEDIUM = Size(
    name="medium",
    token=TransformerConfig(192, 5, 6, 512),
    blt=_blt(TransformerConfig(96, 1, 2, 256, window=64), 1, 32, 16381, 32),
    train_bytes=250_000,
    main=(TOKEN, "blt-4.5", "blt-8"),
    seeds=1,
    profiled=True,
)
CPU = Scale(
    name="cpu",
    smoke=True,
    sizes=(CPU_SMALL, CPU_MEDIUM),
    vocab_size=2048,
    tokenizer_bytes=8 << 20,
    entropy_model=EntropyModelConfig(TransformerConfig(32, 1, 2, 96, window=64, rope_theta=10000.0)),
    entropy_train_bytes=1_000_000,
    calibration_bytes=1 << 18,
    sequence_bytes=576,
    batch_size=8,
    rates=(1e-3, 3e-3, 9e-3, 2.7e-2),
    tuning_share=0.2,
    warmup_share=0.1,
    evaluations=5,
    valid_bytes=1 << 15,
    test_bytes=1 << 16,
    document_bytes=1 << 12,
    language_bytes=1 << 12,
    throughput_seconds=3.0,
)
PAIR = dataclasses.replace(
    CPU,
    name="pair",
    sizes=(
        dataclasses.replace(
            CPU_SMALL,
            train_bytes=300_000,
            main=(TOKEN, "blt-4.5"),
            seeds=1,
            ablations=(),
            robust=(),
            backend_steps=0,
        ),
    ),
    entropy_train_bytes=600_000,
    rates=(6e-3,),
)

GPU_SMALL = Size(
    name="small",
    token=TransformerConfig(512, 8, 8, 1408),  # 26 M parameters without embeddings
    blt=_blt(TransformerConfig(192, 1, 3, 512, window=256), 2, 64, 131071, None),
    train_bytes=60_000_000,
    main=ALL,
    seeds=3,
    ablations=ABLATIONS,
    ablation_seeds=3,
    robust=(TOKEN, "blt-4.5"),
    backend_steps=30,
)
GPU_MEDIUM = Size(
    name="medium",
    token=TransformerConfig(768, 12, 12, 2048),  # 85 M
    blt=_blt(TransformerConfig(256, 1, 4, 704, window=256), 4, 64, 131071, None),
    train_bytes=60_000_000,
    main=(TOKEN, "blt-4.5", "blt-6", "blt-8"),
    seeds=1,
    robust=(TOKEN, "blt-4.5"),
)
GPU = Scale(
    name="gpu",
    smoke=False,
    sizes=(GPU_SMALL, GPU_MEDIUM),
    vocab_size=8192,
    tokenizer_bytes=32 << 20,
    entropy_model=EntropyModelConfig(TransformerConfig(192, 2, 3, 512, window=256, rope_theta=10000.0)),
    entropy_train_bytes=60_000_000,
    calibration_bytes=1 << 20,
    sequence_bytes=4096,
    batch_size=16,
    rates=(5e-4, 1e-3, 2e-3, 4e-3),
    tuning_share=0.15,
    warmup_share=0.1,
    evaluations=12,
    valid_bytes=1 << 19,
    test_bytes=1 << 20,
    document_bytes=1 << 14,
    language_bytes=1 << 16,
    throughput_seconds=4.0,
)
SCALES = {scale.name: scale for scale in (CPU, GPU, PAIR)}
