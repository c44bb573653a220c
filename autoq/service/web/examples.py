"""What requests look like, for readers of the schema."""

from __future__ import annotations

from typing import Annotated

from fastapi import Body

from autoq.wire import (
    ExportRequest,
    MeasureRequest,
    PlanRequest,
    RefineRequest,
    SearchRequest,
    VerifyRequest,
)

SearchBody = Annotated[
    SearchRequest,
    Body(
        openapi_examples={
            "bundled": {
                "summary": "The model that autoq brings, at 5 effective bits",
                "value": {"model": "bundled", "effective_bits": 5.0},
            },
            "target": {
                "summary": "A model below a root, for vLLM on an H200, within 8 GB, exported",
                "value": {
                    "model": "models/llama",
                    "max_gb": 8.0,
                    "target": "vllm:h200",
                    "export": "exports/llama-8gb",
                },
            },
        }
    ),
]
PlanBody = Annotated[
    PlanRequest,
    Body(
        openapi_examples={
            "bits": {"summary": "The plan for 4.8 bits", "value": {"effective_bits": 4.8}},
            "rule": {
                "summary": "The same with the first layer as it is, kept in the study",
                "value": {"effective_bits": 4.8, "rules": ["*layers.0.*=none"], "keep": True},
            },
            "last": {"summary": "The study's last plan", "value": {}},
        }
    ),
]
RefineBody = Annotated[
    RefineRequest,
    Body(openapi_examples={"trials": {"summary": "Measure 30 plans", "value": {"trials": 30}}}),
]
MeasureBody = Annotated[
    MeasureRequest,
    Body(openapi_examples={"plan": {"summary": "Measure plan 1", "value": {"plan": 1}}}),
]
ExportBody = Annotated[
    ExportRequest,
    Body(
        openapi_examples={
            "last": {
                "summary": "The study's last plan",
                "value": {"output": "exports/llama-5", "container": "compressed-tensors"},
            }
        }
    ),
]
VerifyBody = Annotated[
    VerifyRequest,
    Body(
        openapi_examples={
            "target": {
                "summary": "A checkpoint, for an engine",
                "value": {"checkpoint": "exports/llama-5", "target": "vllm:h200"},
            }
        }
    ),
]
