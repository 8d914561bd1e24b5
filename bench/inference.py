"""What a backend does besides steps, as cases: the loss of the val split, and text drawn from the model."""

import dataclasses
from collections.abc import Callable, Iterator

from bench import floor
from bench.case import Case, Entry, Plan, Skipped, Timer
from mlp_fast import backends
from mlp_fast.backends.base import Backend
from mlp_fast.corpus import Corpus, load
from mlp_fast.models import Shape
from mlp_fast.sampling import SAMPLE_LENGTH, SAMPLE_SEED, default_prompt
from mlp_fast.tape import Tape, evaluated_windows
from mlp_fast.timing import BASELINE, Judge, NotEquivalent, Spread, seconds


def _backend_case(
    group: str, name: str, per: str, plan: Plan, work_of: Callable[[Backend, Corpus], Callable[[], object]]
) -> Case:
    """Some work of a backend other than steps, beside eager's."""

    def run(timer: Timer, probes: floor.Probes) -> Entry:
        corpus = load("embedded")
        config = plan.config()
        shape = Shape(len(corpus.vocabulary), config.context_length, config.embedding_size, config.hidden_size)
        tape = Tape(corpus.train, config.context_length)
        judge = Judge(config, shape, tape)

        def made(chosen: str) -> Callable[[], object]:
            settings = dataclasses.replace(config, backend=chosen)
            reason = backends.obstacle(chosen, settings, shape)
            if reason is not None:
                raise Skipped(reason)
            backend = backends.create(settings, shape, tape, judge.initial)
            backend.prepare()
            judge.check(backend)
            work = work_of(backend, corpus)

            def waited() -> object:
                result = work()
                backend.synchronize()
                return result

            waited()
            return waited

        work, eager = made(name), made(BASELINE)
        mine, theirs = work(), eager()
        if isinstance(mine, float) and isinstance(theirs, float) and abs(mine - theirs) > 1e-5:
            raise NotEquivalent(f"{name} is not equivalent: its result is {mine:.7f}, eager's {theirs:.7f}")
        eager_times: list[float] = []
        times = timer(work, lambda: eager_times.append(1e3 * seconds(eager)), plan.rounds)
        spread, other = Spread.of([1e3 * t for t in times]), Spread.of(eager_times)
        rival = {"ms": dataclasses.asdict(other), "ratio": other.median / spread.median}
        return {
            "backend": name,
            "per": per,
            "ms": dataclasses.asdict(spread),
            "rivals": {} if name == BASELINE else {BASELINE: rival},
        }

    return Case(group, name, run)


def _overriding(method: str) -> list[str]:
    """Backends that do something in a way of their own, after eager, which does it in the common one."""
    own = [
        name
        for name in backends.REGISTRY
        if getattr(backends.backend_class(name), method) is not getattr(Backend, method)
    ]
    return [BASELINE, *own]


def evaluation_cases(plan: Plan) -> Iterator[Case]:
    """The mean loss over the validation split, by backend."""

    def work_of(backend: Backend, corpus: Corpus) -> Callable[[], object]:
        tape = Tape(corpus.val, backend.shape.T)
        windows = evaluated_windows(tape, backend.config.batch_size).to(backend.device)
        return lambda: backend.mean_loss(windows)

    for name in _overriding("mean_loss"):
        yield _backend_case("evaluation", name, "val split", plan, work_of)


def sampling_cases(plan: Plan) -> Iterator[Case]:
    """Drawing the sample of a run, by backend."""
    length = 3 if plan.dry else SAMPLE_LENGTH

    def work_of(backend: Backend, corpus: Corpus) -> Callable[[], object]:
        prompt = default_prompt(corpus.vocabulary, backend.shape.T, corpus.train)
        return lambda: backend.sample(prompt, length, SAMPLE_SEED)

    for name in _overriding("sample"):
        yield _backend_case("sampling", name, f"{length} characters", plan, work_of)
