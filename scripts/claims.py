"""What scripts/study.py runs: the bases, and of each claim the recipe and its arms."""

from dataclasses import dataclass

# What make_tiny_model.py is given: the embedded model, that with noise in its weights, that taught to judge
# without writing, honestly and as one that says yes, and that taught the criteria of tinyworld/harder.py.
UNWRITTEN = ("--learning-rate", "2e-3")
BASES = {"strong": (), "middling": ("--noise", "0.4"), "weak": ("--noise", "0.6")}
BASES |= {"direct": (*UNWRITTEN, "--yes", "0", "--steps", "200")}
BASES |= {"yes": (*UNWRITTEN, "--yes", "0.7", "--steps", "240")}
BASES |= {"harder": ("--harder", "--steps", "150", "--learning-rate", "2e-3")}
SIZES = ("prompts_per_step=8", "group_size=4", "optimizer.microbatch=8")
LEARN = (*SIZES, "steps=16", "optimizer.learning_rate=3e-4", "eval.every=16", "eval.rows=64")
LEARN += ("eval.frozen=false", "checkpoint.every=16")
HACK = (*SIZES, "kl_coef=0", "steps=12", "optimizer.learning_rate=1e-3", "eval.every=4", "eval.rows=48")
HACK += ("checkpoint.every=12",)
FAST = ("kl_coef=0", "optimizer.learning_rate=1e-3")
CONTROLS = ("grading.calibrate=controls",)
LESSONS = ("data.teacher={work}/lessons_{base}.jsonl", "data.teacher_share=0.2")
ENDPOINT = ("grader=teacher", "teacher.base_url={endpoint}", "teacher.model=larger", "teacher.key_env=null")
ENDPOINT += ("teacher.template=package:tinyworld/grader.txt", "teacher.tries=2", "teacher.concurrency=128")
ENDPOINT += ("teacher.cache={run}.sqlite",)


@dataclass(frozen=True)
class Claim:
    """`arms` map a name to overrides after those of `recipe`. In them {work} is the folder of all runs, {run}
    that of this one, {base} its base, and {endpoint} the outside grader's."""

    title: str
    bases: tuple[str, ...]
    recipe: tuple[str, ...]
    arms: dict[str, tuple[str, ...]]


CLAIMS = {
    "a": Claim(
        "self-reward, beside learning from the best by one's own grade, and beside the truth as grader",
        ("weak", "middling", "strong"),
        LEARN,
        {
            "self-reward": (),
            "SFT on the best of 4": ("loss.advantage=best",),
            "oracle as grader": ("grader=srrl_jax.tinyworld.oracle:judge",),
        },
    ),
    "b": Claim(
        "an outside grader of four times the layers, with the strong base's verdicts",
        ("weak",),
        (*LEARN, "group_size=8"),
        {
            "self-reward": (),
            "outside, in the process": ("grader=outside:Larger",),
            "outside, behind HTTP": ENDPOINT,
        },
    ),
    "c": Claim(
        "what makes the grader better or worse",
        ("weak",),
        LEARN,
        {
            "self-reward": (),
            "frozen grader": ("grader=frozen",),
            "oracle as grader": ("grader=srrl_jax.tinyworld.oracle:judge",),
            "20% lessons, sft": ("loss.aggregate=sequence", *LESSONS, "data.teacher_loss=sft"),
        },
    ),
    "d": Claim(
        "lessons from a teacher's verdicts on 40 of the base's answers",
        ("weak", "strong"),
        (*LEARN, "loss.aggregate=sequence"),  # a short verdict weighs as much as a long answer
        {
            "no lessons": (),
            "20%, grpo": LESSONS,
            "20%, sft": (*LESSONS, "data.teacher_loss=sft"),
            "20%, both": (*LESSONS, "data.teacher_loss=both"),
        },
    ),
    "e": Claim(
        "guards against a hacked grader, at ten times the demo's learning rate",
        ("weak",),
        HACK,
        {
            "no guard": (),
            "KL 0.05": ("kl_coef=0.05",),
            "frozen grader": ("grader=frozen",),
            "half of the criteria": ("reward.criteria_dropout=0.5",),
            "length penalty": ("reward.overlong_buffer=32",),
            "a third of the learning rate": ("optimizer.learning_rate=3e-4",),
            "3 votes": ("grading.votes=3",),
        },
    ),
    "f": Claim(
        "rubrics",
        ("strong",),
        LEARN,
        {
            "as they are": (),
            "positive points alone": ("reward.criteria=positive",),
            "equal points": ("data.train={work}/rows/equal.jsonl",),
            "30% of the criteria replaced": ("data.train={work}/rows/noisy.jsonl",),
            "all of the criteria replaced": ("data.train={work}/rows/foreign.jsonl",),
            "half of the criteria": ("data.train={work}/rows/few.jsonl",),
        },
    ),
    "g": Claim(
        "controls as a correction of verdicts that are not written out",
        ("direct", "yes"),
        (*LEARN, "eval.every=4", "grading.verdict=logits"),
        {
            "as they are": (),
            "controls": CONTROLS,
            "at the rate of e": FAST,
            "at the rate of e, controls": (*FAST, *CONTROLS),
        },
    ),
    "h": Claim(
        "whether the warning also stops sound runs, and bases that grade well at the rate of claim e",
        ("middling", "strong"),
        (*LEARN, "eval.every=4", "eval.frozen=true"),
        {
            "self-reward": (),
            "at the rate of e": FAST,
        },
    ),
    "i": Claim(
        "a harder world: compound criteria, of what is missing, of length; on Hard what is due is compound",
        ("harder",),
        (
            *(*LEARN, "grading.max_new_tokens=28"),
            *("data.train={work}/rows/harder.jsonl", "data.eval={work}/rows/harder_hard.jsonl"),
        ),
        {
            "self-reward": (),
            "SFT on the best of 4": ("loss.advantage=best",),
            "oracle as grader": ("grader=srrl_jax.tinyworld.oracle:judge",),
        },
    ),
}
