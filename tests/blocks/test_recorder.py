"""What is repeated does what was recorded, on what its tensors hold then."""

import pytest
import torch

from blocks.recorder import GraphRecorder, Recorder, TraceRecorder

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
EACH = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
)


def recorder_of(device: str) -> Recorder:
    return GraphRecorder(torch.device(device)) if device == "cuda" else TraceRecorder()


@EACH
def test_a_repetition_reads_its_tensors_anew_and_writes_into_them(device: str) -> None:
    given, kept = torch.zeros(3, device=device), torch.zeros(8, device=device)
    place = torch.zeros(3, dtype=torch.long, device=device)

    def run() -> tuple[torch.Tensor, ...]:
        kept.index_copy_(0, place, given * 2)
        return (kept + 1,)

    with torch.inference_mode():
        repeat = recorder_of(device).record(run, [given, kept, place])
        kept.zero_()
        for first, value in ((0, 5.0), (3, 7.0)):
            given.fill_(value)
            place.copy_(torch.arange(first, first + 3))
            (found,) = repeat()
    assert found.tolist() == [11, 11, 11, 15, 15, 15, 1, 1]
    assert kept.tolist() == [10, 10, 10, 14, 14, 14, 0, 0]


@EACH
def test_what_looks_at_a_value_cannot_be_recorded_and_recording_goes_on(device: str) -> None:
    given = torch.ones(3, device=device)

    def looks() -> tuple[torch.Tensor, ...]:
        return (given * int(given.sum()),)

    recorder = recorder_of(device)
    with pytest.raises(RuntimeError):
        recorder.record(looks, [given])
    repeat = recorder.record(lambda: (given * 3,), [given])
    given.fill_(2)
    assert repeat()[0].tolist() == [6, 6, 6]


def test_a_number_of_python_is_what_it_was_when_it_was_recorded() -> None:
    given, numbers = torch.ones(2), [1]
    repeat = TraceRecorder().record(lambda: (given * numbers[0],), [given])
    numbers[0] = 5
    assert repeat()[0].tolist() == [1, 1]
