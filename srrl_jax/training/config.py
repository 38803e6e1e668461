"""The recipe of a run: one YAML file, overridden by key=value."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field

from srrl_jax.errors import InputError, check_finite
from srrl_jax.grading import JudgeConfig, TeacherConfig
from srrl_jax.parallel import MeshConfig
from srrl_jax.sampling import SamplingConfig
from srrl_jax.training.settings import find_recipe, read_settings

# Bounds of keys, which `TrainConfig.from_dict` checks.
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Row sources (see `srrl_jax.data.load_examples`), and which of their rows are used.

    Attributes:
      train: training rows.
      eval: held-out rows, optional.
      minus: rows to leave out of the training rows, by prompt_id: main minus Hard is Easy.
      teacher: graded rows that `srrl grade` wrote, of which lessons in grading are made (`lessons.py`).
      teacher_share: lessons among all prompts of a run, from 0 to below 1.
      teacher_loss: how lessons are learnt: "grpo" from the policy's own replies, "sft" by cross-entropy with
        the teacher's reply, "both" by all replies but the last, in whose place the teacher's is.
      where: tags of the training rows and criteria to keep (see `srrl_jax.data.select`).
      too_long: what becomes of rows that are over `rollout.max_prompt_tokens` or the model's positions:
        "error" lists them before anything is compiled, "drop" leaves them out and says which.
      fields: what the rows call "prompt", "rubrics", "criterion" and "points", where they have no schema
        that is known (see `srrl_jax.data.schemas`); for all sources but the teacher's.
    """

    train: str
    eval: str | None = None
    minus: str | None = None
    teacher: str | None = None
    teacher_share: Share = 0.0
    teacher_loss: Literal["grpo", "sft", "both"] = "grpo"
    where: tuple[str, ...] = ()
    too_long: Literal["error", "drop"] = "error"
    fields: dict[Literal["prompt", "rubrics", "criterion", "points"], str] = dataclasses.field(
        default_factory=dict
    )


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How the policy answers.

    Attributes:
      max_new_tokens: limit of a completion.
      max_prompt_tokens: limit of a prompt, for `data.too_long`; null is what the model's positions leave.
      memory_gb: GB of each device that sampling may take beside the weights; with long prompts fewer run at
        one time. null is what weights, moments and the reference leave (on a CPU at most half of the memory).
      thinking: whether the chat template asks for a <think> block.
      int8: decode with "weights" in 8 bits, or with K/V caches too ("weights_kv"); training keeps its own.
    """

    max_new_tokens: Count
    max_prompt_tokens: Count | None = None
    memory_gb: Positive | None = None
    thinking: bool = False
    int8: Literal["none", "weights", "weights_kv"] = "none"
    sampling: SamplingConfig = SamplingConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradingConfig(JudgeConfig):
    """How responses are graded.

    Attributes:
      memory_gb: as in `rollout`.
      int8: as in `rollout`, for replies that are written out.
    """

    memory_gb: Positive | None = None
    int8: Literal["none", "weights", "weights_kv"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.verdict != "generate" and self.int8 != "none":
            raise InputError("int8: needs a reply that is written out; set it none, or verdict: generate")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """From verdicts to the rewards that the policy learns from.

    Attributes:
      criteria: "signed" subtracts the points of a negative criterion that is met (the paper);
        "positive" leaves negative criteria out.
      soft: count a criterion by its probability of being met, not by its verdict; of `grading.votes` or of
        the logits (`grading.verdict`).
      drop_unvarying: leave out criteria on which a whole group has the same verdict (DR Tulu). Advantages
        divided by the group's deviation do not change by it, others grow.
      reweight: count points by this power of how much the group's verdicts on a criterion differ, 4 p (1 - p)
        of the share p that meets it (in the spirit of POW3R); 0 is off, above it unvarying ones are left out.
      criteria_dropout: share of a rubric's criteria that a group is not rewarded by, drawn anew in each step:
        what is exploited in one step may be left out in the next.
      axis_weights: factors of points by HealthBench axis ("accuracy", ...); 1 where not named.
      overlong: "mask" keeps truncated completions out of the baseline and the loss (DAPO, 2503.14476).
      overlong_buffer: tokens before the limit over which a penalty grows from 0 to 1 (DAPO eq. 13).
      zero_variance: "drop" keeps groups whose rewards are all equal out of the loss's denominator.
      resample: how many times such groups are answered and graded anew, in the same step (in the spirit
        of DAPO's dynamic sampling, which draws other prompts).
      function: `package.module:name` of a reward of one's own, from a group (`srrl_jax.training.Group`, which
        has the rewards by the keys above) to one number a response; `overlong*` is applied to that.
    """

    criteria: Literal["signed", "positive"] = "signed"
    soft: bool = False
    drop_unvarying: bool = False
    reweight: Annotated[float, Field(ge=0, le=100)] = 0.0
    criteria_dropout: Share = 0.0
    axis_weights: dict[str, NotNegative] = dataclasses.field(default_factory=dict)
    overlong: Literal["keep", "mask"] = "keep"
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    zero_variance: Literal["keep", "drop"] = "keep"
    resample: Annotated[int, Field(ge=0)] = 0
    function: str | None = None


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective, see `srrl_jax.losses`.

    Attributes:
      advantage: how a reward is set against its group, `group_advantages`.
      ratio: "token", or "sequence" for GSPO's ratio of whole completions.
      aggregate: how tokens are weighed, `token_weights`.
      clip_low, clip_high: bounds of the ratio.
      dual_clip: bound of the ratio under negative advantages; null is none.
      kl_estimator: of the penalty that `kl_coef` weighs, `kl_penalty`.
      entropy_coef: weight of the entropy bonus.
      importance_cap: truncated importance weights against a sampler whose arithmetic differs, at the
        price of one more forward pass; null is off.
      balance_experts: adds the load-balancing loss of a mixture of experts, by the `router_aux_loss_coef`
        of the checkpoint's config.json.
    """

    advantage: Literal["std", "mean", "leave_one_out", "best"] = "std"
    ratio: Literal["token", "sequence"] = "token"
    aggregate: Literal["token", "sequence", "constant"] = "token"
    clip_low: NotNegative = 0.2
    clip_high: NotNegative = 0.28
    dual_clip: float | None = None
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: NotNegative = 0.0
    importance_cap: Positive | None = None
    balance_experts: bool = False


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Learn low-rank adapters beside the weights of `model`, which stay as they are.

    Attributes:
      rank: of the adapters; 0 learns all weights, without adapters.
      alpha: adapters are scaled by alpha / rank.
      targets: projections that have one, in every layer.
    """

    rank: Annotated[int, Field(ge=0)] = 0
    alpha: Positive = 32.0
    targets: tuple[
        Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...
    ] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise InputError(f"lora.targets: must be different projections, not {list(self.targets)}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW at a constant learning rate after a linear warm-up.

    Attributes:
      minibatches: updates of one step; each takes its share of the step's prompts.
      microbatch: prompts (with their whole groups) of one forward and backward pass; null is as many as fit
        the memory (`srrl_jax.training.shapes`).
      remat: what the backward pass computes again instead of keeping it: "none"; "full", all of each layer;
        "dots", all but products with weights; "auto" is as little as fits the memory.
      moments: where AdamW's moments lie; from "host" they come to the devices for each update, and leave
        again.
      first_moment: type in which AdamW keeps its first moment; bfloat16 saves 2 bytes a weight.
      max_skipped: so many updates in a row with a loss or gradient that is not finite end the run.
    """

    learning_rate: NotNegative = 1e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    weight_decay: NotNegative = 0.1
    beta1: Share = 0.9
    beta2: Share = 0.999
    grad_clip: Positive = 1.0
    minibatches: Count = 1
    microbatch: Count | None = None
    remat: Literal["auto", "none", "full", "dots"] = "auto"
    moments: Literal["device", "host"] = "device"
    first_moment: Literal["float32", "bfloat16"] = "float32"
    max_skipped: Count = 5


# What a run's results depend on beside its recipe; a hash of each is kept with it.
Depends = Literal[
    "weights", "tokenizer", "chat_template", "grader_template", "teacher_template",
    "rows", "held_out_rows", "lessons", "reward", "grader",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every so many steps, and after the last; the newest `keep` stay.

    Attributes:
      best: the checkpoint with the highest value of this metric stays too, of those at whose step it
        was measured.
      preemption_seconds: SIGTERM ends the run within this time, see `srrl_jax.run.preemption`.
      accept_changes: what may be another than when the run began, though its results depend on it.
    """

    every: Count = 10
    keep: Count = 2
    best: Literal["eval/self", "reward/mean"] | None = None
    preemption_seconds: Positive = 25.0
    accept_changes: tuple[Depends, ...] = ()


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out rows (the first `rows` of data.eval), answered and graded every so many steps.

    The live policy grades them, and the teacher where there is one, see `srrl_jax.training.monitor`.

    Attributes:
      frozen: let the starting weights grade them too, which costs a copy of the weights and a pass.
      margin: a warning is given where the scores by the live and by the frozen weights are further apart.
      agreement: and where the policy gives fewer of the frozen start's verdicts; an unreadable one is not.
      controls: on the first so many rows the live policy also grades answers that cannot meet the criteria,
        see `srrl_jax.training.monitor`; 0 is off.
      control_met: a warning is given where it says "met" to more than this share of them.
      stop_on_warning: end the run, with a checkpoint, after a step whose evaluation gave such a warning.
    """

    every: Count = 10
    rows: Count = 32
    samples: Count = 1
    frozen: bool = True
    margin: NotNegative = 0.1
    agreement: NotNegative = 0.8
    controls: Annotated[int, Field(ge=0)] = 8
    control_met: NotNegative = 0.2
    stop_on_warning: bool = False


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. `steps` counts rollout-grade-update rounds.

    The steps of `profile` are traced by JAX's profiler; true is the second, since the first one compiles.
    `matmul_precision`: of products of float32 where `dtype` is float32, see `srrl_jax.parallel.computing`.
    `dtype`: of activations and products, and of all weights but those that are learnt, which are float32.
    `reference`: where the frozen starting weights lie;
    from "host" they come to the devices for each use, and leave again.
    `grader` is "policy", "frozen" (the starting weights), "teacher", or a grader of one's own as
    `package.module:name`, a `srrl_jax.grading.Judge` or a function (conversation, response, criteria) ->
    verdicts.
    `trackers` are told of each step, see `srrl_jax.telemetry.trackers`.
    """

    run_dir: str
    model: str
    data: DataConfig
    steps: Count
    rollout: RolloutConfig
    grading: GradingConfig
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    prompts_per_step: Count = 32
    group_size: Annotated[int, Field(ge=2)] = 4
    grader: str = "policy"
    teacher: TeacherConfig | None = None
    kl_coef: NotNegative = 0.0
    reference: Literal["device", "host"] = "device"
    dtype: Literal["float32", "bfloat16"] = "float32"
    matmul_precision: Literal["highest", "default"] = "highest"
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    profile: pydantic.StrictBool | tuple[int, ...] = ()
    trackers: tuple[str, ...] = ()
    reward: RewardConfig = RewardConfig()
    loss: LossConfig = LossConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        check_finite(self)
        o, r = self.optimizer, self.rollout
        if not all(1 <= step <= self.steps for step in self.profiled):
            raise InputError(f"profile: must be of 1 to steps ({self.steps}), not {list(self.profiled)}")
        if self.prompts_per_step % (o.minibatches * (o.microbatch or 1)):
            raise InputError(
                f"prompts_per_step ({self.prompts_per_step}) must be a multiple of optimizer.minibatches"
                + (
                    f" x optimizer.microbatch ({o.minibatches} x {o.microbatch})"
                    if o.microbatch
                    else f" ({o.minibatches})"
                )
            )
        if r.sampling.temperature == 0:
            raise InputError(
                "rollout.sampling.temperature: a group of greedy samples is all the same; set > 0"
            )
        if r.sampling.truncates:
            # Probabilities in the update are those of the whole distribution.
            raise InputError("rollout.sampling: top_k, top_p and min_p must be off; training needs log-probs")
        dual = self.loss.dual_clip
        if dual is not None and not dual > 1 + self.loss.clip_high:
            raise InputError(f"loss.dual_clip: must be above 1 + loss.clip_high, not {dual}")
        if self.reward.overlong_buffer > r.max_new_tokens:
            raise InputError("reward.overlong_buffer: must not be over rollout.max_new_tokens")
        if self.data.teacher_share > 0 and self.data.teacher is None:
            raise InputError("data.teacher_share: needs data.teacher, a file that `srrl grade` wrote")
        if self.judge == "own" and ":" not in self.grader:
            raise InputError(
                f"grader: must be policy, frozen, teacher or package.module:name, not {self.grader!r}"
            )
        if self.reward.function is not None and ":" not in self.reward.function:
            raise InputError(f"reward.function: must be package.module:name, not {self.reward.function!r}")
        if self.grader == "teacher" and self.teacher is None:
            raise InputError("grader: teacher needs the key teacher, with its base_url, model and cache")
        if self.reference == "host" and self.lora.rank:
            raise InputError("reference: with LoRA it is the policy's own frozen weights; set it to device")
        if self.checkpoint.best == "eval/self" and self.data.eval is None:
            raise InputError("checkpoint.best: eval/self is measured on data.eval, which is not given")

    @property
    def profiled(self) -> tuple[int, ...]:
        """The steps that are traced."""
        if isinstance(self.profile, bool):
            return (min(2, self.steps),) if self.profile else ()
        return self.profile

    @property
    def judge(self) -> Literal["policy", "frozen", "teacher", "own"]:
        """The kind of `grader`."""
        return self.grader if self.grader in ("policy", "frozen", "teacher") else "own"

    @property
    def needs_frozen(self) -> bool:
        """Whether the starting weights are kept: for the KL penalty, or to grade."""
        return self.kl_coef > 0 or self.frozen_grades

    @property
    def frozen_grades(self) -> bool:
        """Whether the starting weights grade: what is learnt from, or held-out rows to watch the grader."""
        return self.grader == "frozen" or (self.eval.frozen and self.data.eval is not None)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Reads a YAML recipe and applies `key.sub=value` overrides, whose values are YAML too.

        `path` may be the name of one of the package's recipes, such as "demo". `inherits: other.yaml`, beside
        the recipe, takes every key of that recipe that is not set anew. A value "package:FILE" is the path of
        a file of this package.

        Raises:
          InputError: names the file or override, the key, and for an unknown key the nearest known.
        """
        values = read_settings(cls, find_recipe(path), overrides)
        return cls.from_dict(values, where=str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> Self:
        """Checks types and ranges of a nested dict; see `load` for errors."""
        try:
            return pydantic.TypeAdapter(cls).validate_python(values)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            # A config's own check names its key itself.
            message = first["msg"].removeprefix("Value error, ").removeprefix(f"{key}: ")
            got = "" if first["type"] in ("missing", "value_error") else f", not {first['input']!r}"
            raise InputError(f"{where}: {key + ': ' if key else ''}{message}{got}") from None

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain YAML values."""
        return pydantic.TypeAdapter(type(self)).dump_python(self, mode="json")
