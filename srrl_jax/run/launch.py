"""The start of a run: checks of all that it is given, then models, programs and the loop."""

from collections.abc import Iterable, Sequence

from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.grading import Judge
from srrl_jax.locking import sole_writer
from srrl_jax.parallel import computing, make_mesh
from srrl_jax.rubrics import Example
from srrl_jax.run.checks import check_identity, check_processes, check_run, run_programs
from srrl_jax.run.session import OnStep, Session
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.experience import make_actor
from srrl_jax.training.learner import Learner, build_model
from srrl_jax.training.loop import train_loop
from srrl_jax.training.monitor import open_teacher
from srrl_jax.training.own import GraderFunction, Reward, bring, try_out
from srrl_jax.training.tasks import load_tasks
from srrl_jax.training.update import TrainState


def train(
    config: TrainConfig,
    *,
    reward: Reward | None = None,
    grader: Judge | GraderFunction | None = None,
    rows: Iterable[Example] | None = None,
    callbacks: Sequence[OnStep] = (),
) -> TrainState:
    """Runs a recipe from its start, or from the last checkpoint of its run directory; returns its end.

    >>> import srrl_jax
    >>> def brevity(group):  # the rubric's reward, less a thousandth for each token
    ...     return group.rewards - 0.001 * np.array(group.lengths)
    >>> config = srrl_jax.TrainConfig.load("demo", ["steps=1", "prompts_per_step=2", "group_size=2",
    ...     "optimizer.microbatch=1", "data.eval=null", f"run_dir={run_dir}"])
    >>> state = srrl_jax.train(config, reward=brevity)

    Args:
      reward: of a group (`srrl_jax.training.Group`), one number a response, in place of the rubric's.
      grader: what has `grade` (`srrl_jax.grading.Judge`), or a function (conversation, response, criteria)
        -> verdicts (true, false, or None where it cannot say); it decides the rewards, and grades held-out
        answers beside the policy.
      rows: training rows, in place of those of `data.train`.
      callbacks: each is called with a step, its metrics and its rows of samples.jsonl, on process 0.

    Hashes of `rows`, of the source of `reward` and `grader`, and of the files that results depend on are kept
    in config.yaml.
    Raises:
      InputError: in config, rows, checkpoint or what was handed in, before anything is compiled or written;
        another process trains in `run_dir`;
        later when the disk is full, or after too many updates in a row that were not finite.
      Preempted: after SIGTERM; after SIGINT its subclass `Interrupted`, when the step under way is done.
    """
    own = bring(config, reward, grader, rows)
    config = own.config
    changes = check_run(config)
    tokenizer = load_tokenizer(config.model)
    tasks = load_tasks(config, tokenizer, own.rows)
    identity = tasks.identity | own.identity
    check_processes(config, identity)
    changes += check_identity(config, identity)
    try_out(own, tasks.train[0].example, config.group_size)
    mesh = make_mesh(config.mesh)

    with (
        computing(mesh, config.dtype, config.matmul_precision),
        open_teacher(config) as teacher,
        sole_writer(f"{config.run_dir}/writer"),
    ):
        model = build_model(config)
        lengths = tasks.lengths(config)
        actor = make_actor(model, tokenizer, config, mesh, lengths)
        learner = Learner(model, config, mesh, lengths.longest_prompt)
        weights = {"weights": learner.fingerprint()}
        changes += check_identity(config, weights)

        with Session(config, changes, identity | weights, callbacks) as session:
            state = session.resume(learner.init_state())
            session.note_dropped(tasks.dropped)
            session.compile_ahead(run_programs(config, actor, learner, state), mesh)
            return train_loop(config, tokenizer, tasks, actor, learner, state, session, own, teacher)
