"""What an engine computes in is read off TensorRT's own description, in the forms that its versions give it."""

from __future__ import annotations

import pytest

from unipinrec.errors import BackendError
from unipinrec.runtime.trt.layers import Layer, LayerReport, Products, report_layers, require_precision

# Shortened lines: of TensorRT-RTX 1.7, of TensorRT 10 and of an older one.
RTX = """Layers:
Name: __mye1_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, \
Metadata:
Name: linear [profile 1]_myl1_8, LayerType: gemm, Inputs: [ { Name: x [profile 1], Dimensions: [-1,64], \
Strides: [64,1], StrideOrder: [1,0], Datatype: BFloat16, Format: (Linear) Row major linear format }], Constants: \
[ { Name: alpha, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major linear \
format }], Outputs: [ { Name: y, Dimensions: [-1,64], Strides: [64,1], StrideOrder: [1,0], Datatype: BFloat16, Format: \
(Linear) Row major linear format }], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: \
[ONNX Layer: linear][ONNX Layer: Split_1]
Name: _gemm_mha_v2_myl0_11, LayerType: kgen, Inputs: [ { Name: q, Dimensions: [-1,-1,32], Datatype: BFloat16, Format: \
(Linear) Row major linear format }], Constants: [], Outputs: [ { Name: o, Dimensions: [-1,-1,32], Datatype: BFloat16, \
Format: (Linear) Row major linear format }], TacticName: _gemm_mha_v2_0x406e, StreamId: 0, Metadata: \
[ONNX Layer: attention]
Name: __myl_CastMean_myl0_9, LayerType: kgen, Inputs: [ { Name: a, Datatype: Float, Format: x }, { Name: n, Datatype: \
Int64, Format: x }], Constants: [], Outputs: [ { Name: b, Datatype: BFloat16, Format: x }], TacticName: __myl_0x1, \
StreamId: 0, Metadata: [ONNX Layer: norm]

I/O Tensors:
- Name: past_key_values.0.key, IOMode: Input, DataType: BFloat16, Dimensions: [-1,2,-1,32], Location: Device
- Name: timestamps_ms, IOMode: Input, DataType: Int64, Dimensions: [-1], Location: Device
- Name: logits, IOMode: Output, DataType: Float, Dimensions: [-1,-1,8], Location: Device
"""
TENSORRT_10 = """Name: /linear/Gemm_myl9_4, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [1,4096], \
Format/Datatype: Half }, { Name: alpha, Dimensions: [1], Format/Datatype: Float }], Outputs: [ { Name: y, Dimensions: \
[1,1000], Format/Datatype: Half }], TacticName: sm50_xmma_cublas_gemvx_f16f16_f32, StreamId: 0, Metadata: \
[ONNX Layer: /linear/Gemm]\x1e[ONNX Layer: bias]"""
FORMATS = """Name: c, LayerType: CaskConvolution, Inputs: [ { Name: x, Location: Device, Dimensions: [1,3], \
Format/Datatype: Row major linear FP32 }], Outputs: [ { Name: y, Location: Device, Dimensions: [1], Format/Datatype: \
Channel major FP16 format where channel % 4 == 0 }], ParameterType: Convolution, Weights: {"Count": 1}, \
TacticName: sm80_tf32f32, StreamId: 0, Metadata: [ONNX Layer: conv]"""


def wanted(attention: str | None = None, **matrices: str) -> Products:
    return Products(matrices=matrices, attentions={"attention": attention} if attention else {})


def line(node: str, kind: str, reads: str, tactic: str = "t") -> str:
    return (
        f"Name: {node}_myl0, LayerType: {kind}, Inputs: [ {{ Name: x, Datatype: {reads}, Format: f }}], Constants: [], "
        f"Outputs: [ {{ Name: y, Datatype: {reads}, Format: f }}], TacticName: {tactic}, StreamId: 0, Metadata: "
        f"[ONNX Layer: {node}]"
    )


def test_lines_of_tensorrt_rtx() -> None:
    report = report_layers(RTX, wanted("bfloat16", linear="bfloat16"))
    assert report.layers == (
        Layer(name="__mye1_0_myl0_0", kind="shape_call", inputs=(), outputs=(), nodes=(), tactic=""),
        Layer(
            name="linear [profile 1]_myl1_8",
            kind="gemm",
            inputs=("bfloat16",),
            outputs=("bfloat16",),
            nodes=("linear", "Split_1"),
            tactic="__myelin_CASK_STUB",
        ),
        Layer(
            name="_gemm_mha_v2_myl0_11",
            kind="kgen",
            inputs=("bfloat16",),
            outputs=("bfloat16",),
            nodes=("attention",),
            tactic="_gemm_mha_v2_0x406e",
        ),
        Layer(
            name="__myl_CastMean_myl0_9",
            kind="kgen",
            inputs=("float32", "int64"),
            outputs=("bfloat16",),
            nodes=("norm",),
            tactic="__myl_0x1",
        ),
    )
    assert report.tensors == {"past_key_values.0.key": "bfloat16", "timestamps_ms": "int64", "logits": "float32"}
    assert report.attention == {"attention": "fused"}
    assert report.fallen == {}


def test_lines_of_tensorrt_10() -> None:
    (layer,) = report_layers(TENSORRT_10, Products(matrices={"/linear/Gemm": "float16"}, attentions={})).layers
    assert (layer.inputs, layer.outputs) == (("float16", "float32"), ("float16",))
    assert layer.nodes == ("/linear/Gemm", "bias")
    (layer,) = report_layers(FORMATS, wanted(conv="float32")).layers
    assert (layer.inputs, layer.outputs, layer.tactic) == (("float32",), ("float16",), "sm80_tf32f32")


def test_a_product_that_fell_to_another_type_is_listed() -> None:
    text = "\n".join([line("a", "gemm", "BFloat16"), line("b", "gemm", "Float"), line("c", "runtime_fusion", "Half")])
    report = report_layers(text, wanted(a="bfloat16", b="bfloat16", c="bfloat16", gone="bfloat16"))
    assert report.fallen == {"b": "float32", "c": "float16"}
    with pytest.raises(
        BackendError, match=r"^2 layers do not compute in bf16: b \(float32\), c \(float16\); the engine"
    ):
        require_precision(report, "bf16")


def test_what_surrounds_a_product_may_be_in_fp32() -> None:
    text = "\n".join([line("a", "kgen", "Float"), line("a", "gemm", "BFloat16")])
    assert report_layers(text, wanted(a="bfloat16")).fallen == {}
    turned = "\n".join([line("a", "kgen", "BFloat16"), line("a", "gemm", "Float")])
    assert report_layers(turned, wanted(a="bfloat16")).fallen == {"a": "float32"}
    assert report_layers(line("a", "kgen", "BFloat16"), wanted(a="bfloat16")).fallen == {}


def test_fp32_means_all_of_it() -> None:
    exact = report_layers(line("a", "gemm", "Float"), wanted(a="float32"))
    assert exact.fallen == {}
    require_precision(exact, "fp32")
    text = "\n".join(
        [line("a", "gemm", "Float"), line("b", "gemm", "Float", "sm80_xmma_gemm_tf32f32"), line("n", "kgen", "Half")]
    )
    fallen = report_layers(text, wanted(a="float32", b="float32")).fallen
    assert fallen == {"b_myl0": "tf32", "n_myl0": "float16"}


def test_attention_in_pieces_is_told() -> None:
    text = "\n".join([line("attention", "gemm", "Float"), line("attention", "kgen", "Float")])
    assert report_layers(text, wanted("float32")).attention == {"attention": "decomposed"}
    other = line("a", "gemm", "Float")
    assert report_layers(other, wanted("float32", a="float32")).attention == {"attention": "unseen"}


def test_many_fallen_layers_are_shortened() -> None:
    report = LayerReport(layers=(), tensors={}, fallen={f"node{i}": "float32" for i in range(9)}, attention={})
    with pytest.raises(BackendError, match=r"^9 layers do not.*node4 \(float32\), and others;"):
        require_precision(report, "bf16")


@pytest.mark.parametrize(
    "text", ["", "Layers:\n", line("other", "gemm", "Half"), line("a", "gemm", "N/A due to shapes")]
)
def test_an_engine_that_does_not_tell_is_refused(text: str) -> None:
    with pytest.raises(BackendError, match=r"did not describe the layers of the engine.*was not installed"):
        report_layers(text, wanted(a="float16"))
