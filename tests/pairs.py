"""Which public callbacks go together: each pair as it is written, what becomes of it, and why.

`tests/test_pairs.py` trains every pair in both orders, or sees it refused; `python -m tests.pairs_table` writes them
down for readers. A run has 16 steps, and is gone on with from the 8th, after which something is still to happen.
"""

from dataclasses import dataclass

import torch
from torch import nn

import lightning_compress
from tests.contract.settings import Peer, teacher

WORKS, ORDERED, REFUSED = "works", "ordered", "refused"


@dataclass(frozen=True)
class Pair:
    """Two callbacks of one run.

    Attributes:
        first, second: as they are written in Python.
        verdict: whether both do all that they promise; do so because one gives way to the other; or are refused.
        why: in words; for what is refused, words of the error.
    """

    first: str
    second: str
    verdict: str
    why: str

    def callbacks(self):
        """Both, made anew; a second one of a kind has a name of its own."""
        known = {**vars(lightning_compress), "teacher": teacher(), "peer": Peer(), "example": torch.ones(2, 8)}
        one, other = (eval(text, known) for text in (self.first, self.second))
        if one.name == other.name:
            other.name = f"{other.name}_2"
        return [one, other]

    def kinds(self):
        """The names of the two classes, in the order of the alphabet."""
        return tuple(sorted(text.partition("(")[0] for text in (self.first, self.second)))


def network():
    """The student: two layers whose channels may go, and one that gives the output."""
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


MAGNITUDE = "Pruning(0.5, begin=1, end=12, every=3)"
MOVEMENT = 'Pruning(0.5, criterion="movement", begin=1, end=12, every=3)'
WANDA = 'Pruning(0.5, criterion="wanda", begin=1, end=12, every=3)'
ROWS = 'Pruning(0.5, granularity="row", begin=1, end=12, every=3)'
PAIRED = 'Pruning(0.5, granularity="2:4", begin=10, end=14)'
CUT = "ChannelPruning(sparsity=0.5, begin=2, end=10, every=4)"
SOFT = "Distillation(teacher, alpha=0.5)"
AVERAGED = "Distillation(AveragedTeacher(0.9), alpha=0.5)"
PAST = 'Distillation("self@3 steps", alpha=0.5)'
PEER = "Distillation(PeerTeacher(peer), alpha=0.5)"
FEATURES = 'Distillation(teacher, losses={("net.0", "0"): "projected_hint"})'
INT8 = "QuantizationAwareTraining(begin=4)"
LEARNED = 'QuantizationAwareTraining(weights=4, activations=4, first="same", last="same", begin=4)'
FREEZE = 'FineTuning(freeze="net.2", begin=4, end=12)'
REWIND = "FineTuning(rewind=3, begin=10, end=14)"
RATES = 'FineTuning(learning_rate="x0.5", warmup=3, begin=4, end=14)'
REPORT = "CompressionReport(latency=False, print_table=False)"

PAIRS = [
    # Pruning
    Pair(
        'Pruning(0.5, targets="net.0", end=12)', 'Pruning(0.25, targets="net.2", end=12)', WORKS,
        "each has weights of its own",
    ),
    Pair(MAGNITUDE, 'Pruning(targets="net.0", begin=13, end=15)', REFUSED, "would both prune net.0.weight"),
    Pair(MAGNITUDE, CUT, WORKS, "masks are cut along with their weights; a later update prunes what is left"),
    Pair(MOVEMENT, CUT, WORKS, "what was gathered of the weights is cut along"),
    Pair(WANDA, CUT, WORKS, "what was gathered of the inputs is cut along"),
    Pair(ROWS, CUT, WORKS, "masks are cut along with their weights; a later update prunes what is left"),
    Pair(
        "Pruning(0.5, begin=1, end=9)", CUT, REFUSED,
        "needs shapes that stay from end=9 on (a cut takes zeros along, and no update comes after it)",
    ),
    Pair(PAIRED, CUT, ORDERED, "units of neighbours are chosen in the step after the last cut"),
    Pair(
        'Pruning(0.5, granularity="2:4", begin=5)', CUT, REFUSED,
        "needs shapes that stay from begin=5 on (a cut breaks units of neighbours apart)",
    ),
    Pair(MAGNITUDE, SOFT, WORKS, "distillation changes the loss, pruning the weights"),
    Pair(MAGNITUDE, AVERAGED, WORKS, "the teacher is an average of weights of which ever more are zero"),
    Pair(MAGNITUDE, PEER, WORKS, "the peer is not pruned"),
    Pair(MAGNITUDE, INT8, WORKS, "zero lies on every grid"),
    Pair(PAIRED, LEARNED, WORKS, "zero lies on every grid, on learned ones too"),
    Pair(
        MAGNITUDE, 'QuantizationAwareTraining(weights="binary", begin=4)', REFUSED, "binary weights have no zero",
    ),
    Pair(MAGNITUDE, FREEZE, WORKS, "what is frozen does not train, but is pruned"),
    Pair(MAGNITUDE, REWIND, WORKS, "masks are put on the weights that come back"),
    Pair(
        'Pruning(0.5, rounds=[5, 10])', "FineTuning(rewind=3, begin=10, end=14)", ORDERED,
        "masks of a round are made of the weights as trained, then the remembered ones come back",
    ),
    Pair(MAGNITUDE, RATES, WORKS, "masks hold at every learning rate"),
    Pair(MAGNITUDE, REPORT, WORKS, "zeros are counted"),
    # Channels
    Pair(
        'ChannelPruning(sparsity=0.5, targets="net.0", begin=2, end=10, every=4)',
        'ChannelPruning(sparsity=0.5, targets="net.2", begin=3, end=12, every=4)', WORKS,
        "each has layers of its own; what one measured of the whole module at first stays its measure",
    ),
    Pair(
        CUT, 'ChannelPruning(macs=0.5, targets="net.2", begin=12, end=15)', REFUSED,
        "would both cut channels of net.2.weight",
    ),
    Pair(CUT, SOFT, WORKS, "outputs keep their shape"),
    Pair(CUT, AVERAGED, WORKS, "the average is cut along"),
    Pair(CUT, PAST, WORKS, "what the student was before the cut is a teacher of its own"),
    Pair(CUT, PEER, WORKS, "the peer is not cut"),
    Pair(CUT, FEATURES, ORDERED, "layers that are compared stay whole; others are cut"),
    Pair(
        'ChannelPruning(sparsity=0.5, targets="net.0", example_input=example)', FEATURES, REFUSED,
        "no channels that could go. Left whole: net.0",
    ),
    Pair(
        CUT, 'Distillation(teacher, losses={("net.1", "1"): "hint"})', REFUSED,
        "compares 'net.1', which has no weights, so it cannot be told whose channels must stay",
    ),
    Pair(CUT, INT8.replace("4", "11"), WORKS, "all cuts come before the grids are laid out"),
    Pair(CUT, LEARNED.replace("begin=4", "begin=10"), ORDERED, "grids are laid out in the step after the last cut"),
    Pair(
        CUT, "QuantizationAwareTraining(begin=9)", REFUSED,
        "needs shapes that stay from begin=9 on (its grids are laid out then)",
    ),
    Pair(CUT, REWIND, WORKS, "remembered weights are cut along"),
    Pair(CUT, RATES, WORKS, "what optimizers remember is cut along"),
    Pair(CUT, FREEZE, ORDERED, "layers that are frozen for a while keep their channels; others are cut"),
    Pair(CUT, REPORT, WORKS, "before and after are measured, each in its shapes"),
    # Distillation
    Pair(SOFT, AVERAGED, WORKS, "the second takes what the first has made of the loss for the loss of the task"),
    Pair(SOFT, INT8, WORKS, "the student is compared as it is quantized; the teacher is not quantized"),
    Pair(FEATURES, LEARNED, WORKS, "the student is compared as it is quantized; the teacher is not quantized"),
    Pair(SOFT, FREEZE, WORKS, "what is frozen learns from no loss"),
    Pair(FEATURES, REWIND, WORKS, "the student's weights come back; what a loss has learned stays"),
    Pair(SOFT, REPORT, WORKS, "the teacher is not measured"),
    # Quantization
    Pair(
        'QuantizationAwareTraining(targets="net.0", begin=4)',
        'QuantizationAwareTraining(weights=4, targets="net.2", begin=6)', REFUSED,
        "would both quantize the model",
    ),
    Pair(INT8, FREEZE, WORKS, "what is frozen is quantized, and does not train"),
    Pair(LEARNED, REWIND, WORKS, "the weights come back; what grids have learned stays"),
    Pair(LEARNED, RATES, WORKS, "what grids learn is trained at the user's rates"),
    Pair(INT8, REPORT, WORKS, "bytes are those of the integers"),
    # The rest
    Pair(FREEZE, 'FineTuning(learning_rate="x0.5", begin=12, end=14)', WORKS, "one begins where the other ends"),
    Pair(FREEZE, RATES, REFUSED, "would both be about net.2.bias, net.2.weight at one time"),
    Pair(FREEZE, REPORT, WORKS, "a report trains nothing"),
    Pair(REPORT, 'CompressionReport(dirpath="elsewhere")', WORKS, "each has a folder of its own"),
    Pair(REPORT, REPORT, REFUSED, "would both write compression_report into the run's own folder"),
]  # fmt: skip
