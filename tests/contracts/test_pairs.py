"""Every ordered pair of strategies: it runs to the end and keeps what the first established, or is refused at once.

What the exported file holds is read with LiteRT's own interpreter, not with the project's reader.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from compress.cli.places import conf_dir
from compress.errors import CompressError

PLAIN = ("compact", "distill", "lowrank", "prune", "prune_channels", "quantize", "share")
"""Every pair of these; of the others, those with what comes before and after them."""
ALIKE = {
    *("block_toeplitz", "butterfly", "kronecker", "low_displacement"),
    *("transferred", "convolutional_head", "finetune", "mutual"),
}
"""What they do to a pipeline is what block_circulant does, or hashed (transferred), or distill (finetune, mutual)."""
OTHERS = sorted({file.stem for file in (conf_dir() / "strategy").glob("*.yaml")} - set(PLAIN) - ALIKE)
PAIRS = [
    *((first, second) for first in PLAIN for second in PLAIN),
    *((first, second) for second in OTHERS for first in ("prune", "share", "lowrank")),
    *((first, "quantize") for first in OTHERS),
]
REFUSED = {
    *((first, second) for first in ("prune", "share") for second in ("lowrank", "compact")),
    *(("prune", second) for second in ("binary_connect", "binary_filters", "dorefa", "xnor", "block_circulant")),
    ("prune", "product_quantization"),
    ("qat", "quantize"),
    *(("share", second) for second in OTHERS if second not in ("qat", "pack", "auto")),
}
NO_BOARD = "board=roofline"
"""Times are not looked at here, and an estimate starts no process."""
CLUSTERS = 16
SPARSITY = 0.6
SETTINGS = {
    "share": f"clusters={CLUSTERS}",
    "prune": f"sparsity={SPARSITY}",
    "mixed_precision": "images=64",
    "rate_distortion": "images=64",
    "hashed": "images=100",
    "product_quantization": "images=64",
    "auto": "bytes=70000 images=32 techniques={prune:{sparsity:[0.75]},quantize:{bits:[8]}}",
}
SETTINGS_AFTER = {("prune", "mixed_precision"): "bytes=0.4"}
"""Of the second stage: the float file of a pruned model leaves its zeros out, and is not far above the integer one."""
LEAST = {"xnor": 30}
"""Accuracies after the short training; binary inputs take longer."""
EPOCHS = {"xnor": 12}
"""Where four are so few that the accuracy hangs on the machine."""


def settings_of(strategy: str, stage: str) -> list[str]:
    return [f"strategy.{stage}.{setting}" for setting in SETTINGS.get(strategy, "").split()]


def weights_in(file: Path) -> list[np.ndarray]:
    """The constant weight tensors of the file: those with two axes or more that hold numbers of a layer."""
    # The operators of LiteRT itself: what a delegate takes over leaves no tensor to read.
    interpreter = Interpreter(
        model_path=str(file),
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    interpreter.invoke()
    # Weights that are stored sparsely are constants once DENSIFY has run.
    operators = [op for op in interpreter._get_ops_details() if op["op_name"] != "DENSIFY"]
    constant = {i for op in operators for i in op["inputs"]} - {i for op in operators for i in op["outputs"]}
    constant -= {d["index"] for d in interpreter.get_input_details()}
    found = []
    for detail in interpreter.get_tensor_details():
        if detail["index"] in constant and len(detail["shape"]) > 1 and detail["dtype"] != np.int32:
            found.append(interpreter.get_tensor(detail["index"]))
    return found


def channels_written(file: Path, layer: str) -> int:
    """Output channels of the weights that carry the layer's name, as stored: their first axis."""
    interpreter = Interpreter(model_path=str(file), experimental_preserve_all_tensors=True)
    interpreter.allocate_tensors()
    shapes = [
        d["shape"] for d in interpreter.get_tensor_details() if f"/{layer}/" in d["name"] and len(d["shape"]) in (2, 4)
    ]
    constant = [shape for shape in shapes if shape[0] > 1]
    assert constant, f"no weights of {layer} in the file"
    return int(constant[0][0])


def operators_in(file: Path) -> list[str]:
    interpreter = Interpreter(model_path=str(file))
    return [op["op_name"] for op in interpreter._get_ops_details()]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["lowrank", "qat", "share", "prune_channels"])
def test_every_strategy_recovers_by_losses_of_inner_layers(strategy, pipeline, tmp_path):
    losses = "recovery.losses={hints: 0.1, relational_distance: 1, activation_boundary: 0.0001, attention: 1}"
    result = pipeline(f"strategy={strategy}", "recovery=distill", losses, NO_BOARD).run(tmp_path)
    assert result.final.accuracy > 90
    assert result.stages[0].recovered.method == "distill"


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_pair(first, second, pipeline, tmp_path):
    second_stage = second if second != first else f"{second}2"
    settings = [setting for name in sorted({first, second}) for setting in settings_of(name, name)]
    if first == second:
        settings += settings_of(first, second_stage)
    if (first, second) in SETTINGS_AFTER:
        settings.append(f"strategy.{second}.{SETTINGS_AFTER[first, second]}")
    settings += [f"recovery.epochs={EPOCHS[name]}" for name in (first, second) if name in EPOCHS]
    built = pipeline(f"strategy={first}+{second}", *settings, NO_BOARD)
    (tmp_path / "first").mkdir()
    (tmp_path / "both").mkdir()
    if (first, second) in REFUSED:
        with pytest.raises(CompressError) as caught:
            built.run(tmp_path / "both")
        assert first in str(caught.value)
        assert second in str(caught.value)
        assert not list((tmp_path / "both").iterdir()), "refused before anything was made"
        return
    result = built.run(tmp_path / "both")
    assert [stage.name for stage in result.stages] == [first, second_stage]
    assert result.final.accuracy > min(LEAST.get(name, 60) for name in (first, second))
    file = tmp_path / "both" / "model.tflite"
    stored = weights_in(file)
    assert stored
    if first == "prune" and second == "prune_channels":
        # Channels with many zeros may go; the zeros of those that stay are all there.
        (masks,) = [g.masks for g in result.candidate.guarantees if g.stage == "prune"]
        assert sum(np.sum(tensor == 0) for tensor in stored) >= sum(np.sum(~mask) for mask in masks.values()) > 0
    elif first == "prune":
        for tensor in stored:
            assert np.mean(tensor == 0) >= SPARSITY - 1 / tensor.size
    if first == "share":
        for tensor in stored:
            assert len(np.unique(tensor)) <= CLUSTERS
    if "quantize" in (first, second):
        assert {tensor.dtype for tensor in stored} == {np.dtype(np.int8)}
    if first in ("lowrank", "compact", "prune_channels"):
        alone = pipeline(f"strategy={first}", NO_BOARD).run(tmp_path / "first")
        before = operators_in(tmp_path / "first" / "model.tflite")
        after = operators_in(file)
        kinds = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
        # A structure makes convolutions of dense layers.
        assert second != "block_circulant" or sum(map(after.count, kinds)) >= sum(map(before.count, kinds))
        for kind in kinds if second != "block_circulant" else ():
            assert after.count(kind) >= before.count(kind)
        # A structured matrix has a scale for each output, too.
        assert result.final.macs <= (1.01 if second == "block_circulant" else 1.0) * alone.final.macs
    if first == "lowrank":
        ranks = [guarantee.ranks for guarantee in alone.candidate.guarantees]
        assert ranks
        assert ranks[0]
        for layer, rank in ranks[0].items():
            assert channels_written(file, f"{layer}_reduce") <= rank
    if first == "prune_channels":
        (widths,) = [guarantee.channels for guarantee in alone.candidate.guarantees]
        assert widths
        for layer, channels in widths.items():
            assert channels_written(file, layer) <= channels


@pytest.mark.slow
@pytest.mark.parametrize("last", ["quantize", "qat"])
@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("others", [("prune", "share"), ("share", "prune")], ids="-".join)
def test_zeros_clusters_and_integers_live_together(others, position, last, pipeline, tmp_path):
    order = [*others[:position], last, *others[position:]]
    built = pipeline(f"strategy={'+'.join(order)}", *(s for k in others for s in settings_of(k, k)), NO_BOARD)
    if last == "qat" and order.index("qat") < order.index("share"):
        with pytest.raises(CompressError, match="share after stage qat"):
            built.run(tmp_path)
        return
    result = built.run(tmp_path)
    assert result.final.accuracy > 60
    for tensor in weights_in(tmp_path / "model.tflite"):
        assert tensor.dtype == np.int8
        assert np.mean(tensor == 0) >= SPARSITY - 1 / tensor.size
        assert len(np.unique(tensor)) <= CLUSTERS
