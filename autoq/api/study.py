"""A study: everything one search found, and what can be done with it without scoring again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq.api.cache_plans import plan_of_weights
from autoq.api.config import parse_container
from autoq.api.renewal import RenewingProgress
from autoq.api.study_data import StudyData
from autoq.api.study_tables import refined_stage
from autoq.errors import InputError
from autoq.formats import FormatName
from autoq.models import SlotName
from autoq.progress import Progress, SilentProgress
from autoq.studies import PlanRecord

if TYPE_CHECKING:
    from autoq.api.refinement.refining import RefineResult
    from autoq.evaluators import Fidelity
    from autoq.layers.simulate import SimulatedModel
    from autoq.layers.weight_cache import WeightCache


class Study(StudyData):
    """One search in a study store: its plans, and what can be done with them."""

    def set_refined(self, start: PlanRecord, plan: PlanRecord) -> None:
        """Take `plan` where `start` is asked for, from now on; `start` itself undoes that."""
        status = self._store.study(self.id).status
        with self.repeated_stage(refined_stage(start)) as payload:
            payload["plan_id"] = plan.id
        self._store.set_status(self.id, status)  # a stage that begins says that the study runs

    # Measuring

    def simulate(self, plan: PlanRecord, *, keep_originals: bool = True) -> SimulatedModel:
        """Put the plan's formats into the loaded model, its cache's included, in place."""
        from autoq.api.kv_cache import cache_simulation
        from autoq.layers.simulate import slot_formats_of

        formats = slot_formats_of(self.model_map, plan.to_plan().assignment)
        simulated = self.simulate_formats(formats, keep_originals=keep_originals)
        simulated.set_kv_cache(cache_simulation(self, plan))
        return simulated

    def simulate_formats(
        self,
        slot_formats: Mapping[SlotName, FormatName],
        *,
        keep_originals: bool = True,
        cache: WeightCache | None = None,
    ) -> SimulatedModel:
        """Put a format into every slot of the loaded model, in place.

        Args:
            keep_originals, cache: as for `autoq.layers.simulate.SimulatedModel`.

        Raises:
            InputError: the model is searched within a bound on memory, and not loaded.
        """
        from autoq.layers.simulate import SimulatedModel

        if self.loaded().stream is not None:
            raise InputError(
                f"study {self.name} was searched within a bound on memory, and this needs the whole "
                "model; open the study anew (autoq.open_study) where there is room for it"
            )
        return SimulatedModel(
            self.loaded().model,
            self.model_map.slots,
            slot_formats,
            self.calibration,
            container=self.config.container,
            scale_dtype=self.storage_dtype,
            keep_originals=keep_originals,
            cache=cache,
        )

    def measure(
        self,
        plan: PlanRecord,
        *,
        data: str | None = None,
        sequences: int = 32,
        progress: Progress | None = None,
    ) -> Fidelity:
        """Measure a plan on held-out tokens and store what was found.

        Args:
            data: where the tokens come from; None is the held-out part of the calibration data.
                Of another source everything may be used.
            sequences: how many held-out sequences.
        """
        from autoq.api.measuring import held_out_tokens, measure_plan

        tokens = held_out_tokens(self, data, sequences=sequences)
        return measure_plan(self, plan, tokens, data=data, progress=progress)

    def validate(
        self,
        *,
        random: int = 40,
        near: int = 40,
        sequences: int = 32,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Measure random and near-optimal plans and judge the predicted losses by them.

        The arguments, the result and the errors are those of `autoq.api.validation.validate`.
        """
        from autoq.api.validation import validate

        return validate(
            self, random=random, near=near, sequences=sequences, seed=seed, progress=progress
        )

    # Refining

    def refine(
        self,
        effective_bits: float | None = None,
        *,
        workers: int = 1,
        ray: str | None = None,
        annotate: bool = False,
        progress: Progress | None = None,
        max_gb: float | None = None,
        max_active_bits: float | None = None,
        **options: Any,
    ) -> RefineResult:
        """Improve a plan by measuring others round it on the real quantised model.

        From then on the refined plan, if one was found, is what `plan`, `summary` and `export` take
        for this budget.

        Args:
            effective_bits, max_gb, max_active_bits: another budget than the last plan's.
            workers: processes that measure at the same time, this one included.
            ray: address of the Ray cluster that the others run on, or "auto"; None starts them here.
            annotate: write notes, plots and files for Optuna's dashboard, where it is installed.
            options: fields of `autoq.api.refinement.refining.RefineOptions`, such as trials and objective.
        Raises:
            InputError, ModelError, StudyLockedError: as `autoq.api.refinement.refining.refine_study`.
        """
        from autoq.api.refinement.edge import check_study
        from autoq.api.refinement.refining import RefineOptions, refine_study

        chosen = RefineOptions(**options)
        check_study(self, chosen, workers)  # before a plan is solved for a new budget, and stored
        plan = self.unrefined_plan(effective_bits, max_gb=max_gb, max_active_bits=max_active_bits)
        return refine_study(
            self,
            plan_of_weights(self, plan),
            chosen,
            workers=workers,
            ray=ray,
            annotate=annotate,
            progress=progress,
        )

    # Exporting

    def export(
        self,
        destination: str | Path,
        *,
        plan: PlanRecord | None = None,
        effective_bits: float | None = None,
        max_gb: float | None = None,
        max_active_bits: float | None = None,
        container: str | None = None,
        tp_size: int = 1,
        pp_size: int = 1,
        with_past: bool = False,
        streamed: bool = False,
        overwrite: bool = False,
        check_logits: bool = True,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Write the checkpoint of a plan, read it back, and record it.

        Args:
            plan: one of the study's, whatever the budgets say; None is the plan for them.
            effective_bits: another budget than the last plan's; needs no pass over data.
            max_gb: the same in 10^9 bytes of the whole checkpoint.
            max_active_bits: the same in bits per weight that a token touches.
            container: "modelopt" or "compressed-tensors"; None is the one searched for. "onnx" is
                a graph with Q/DQ nodes, of what the model computes in the container searched for;
                "tensorrt-llm" is the checkpoint that TensorRT-LLM's engine builder takes;
                "transformers-fp8" is a compressed-tensors one of fp8_block alone in the words of
                transformers' own method fp8.
            tp_size: ranks that share every layer, of the container "tensorrt-llm" only.
            pp_size: stages of layers, of the container "tensorrt-llm" only.
            with_past: keys and values of earlier tokens are inputs and outputs of the graph, of the
                container "onnx" only.
            streamed: read the weights from the model's folder a matrix at a time, for models that
                no memory holds; the same tensors, in files of 256 MiB, whose logits are not compared.
            check_logits: load a compressed-tensors checkpoint with transformers, too, and compare
                its logits with the simulation's, or a transformers-fp8 one and its weights; takes
                the memory of two more models.
        Raises:
            ExportError: the container cannot express the plan, or the folder cannot be written.
            VerificationError: what was written does not read back bit for bit.
            StudyLockedError: another process works on the study.
        """
        from autoq.api.exports.adopted import is_unrecorded
        from autoq.api.exports.exporting import export_plan
        from autoq.api.exports.onnx import (
            ONNX,
            export_onnx_plan,
            refuse_missing_packages,
            refuse_past,
        )
        from autoq.api.exports.streamed import (
            export_plan_streamed,
            refuse_unstreamed_container,
        )
        from autoq.api.exports.tensorrt_llm import (
            TENSORRT_LLM,
            export_tensorrt_llm_plan,
            refuse_parallel,
        )
        from autoq.api.exports.transformers_fp8 import spelled
        from autoq.api.kv_cache import refuse_unwritable_cache
        from autoq.export import check_destination
        from autoq.export._types import Spelling

        streamed = streamed or (self._loaded is not None and self._loaded.stream is not None)
        if streamed:
            refuse_unstreamed_container(container)
        refuse_parallel(container, tp_size, pp_size)
        refuse_past(container, with_past)
        own = spelled(container)
        if container == ONNX:
            refuse_missing_packages()
        spelling = Spelling.OWN
        if own is not None:
            chosen, spelling = own
        elif container in (ONNX, TENSORRT_LLM):
            chosen = self.config.container
        else:
            chosen = parse_container(container) if container else self.config.container
        if plan is None:
            plan = self.plan(effective_bits, max_gb=max_gb, max_active_bits=max_active_bits)
        refuse_unwritable_cache(plan, container or chosen.value)
        is_ours = is_unrecorded(self._store, Path(destination))
        check_destination(
            Path(destination), self._record.model_path or None, overwrite=overwrite or is_ours
        )
        with self._store.lease(self.id) as lease:
            renewing = RenewingProgress(progress or SilentProgress(), lease)
            if container == ONNX:
                return export_onnx_plan(
                    self,
                    plan,
                    Path(destination),
                    overwrite=overwrite,
                    progress=renewing,
                    with_past=with_past,
                )
            if container == TENSORRT_LLM:
                return export_tensorrt_llm_plan(
                    self,
                    plan,
                    Path(destination),
                    tp_size=tp_size,
                    pp_size=pp_size,
                    overwrite=overwrite,
                    progress=renewing,
                )
            if streamed:
                return export_plan_streamed(
                    self,
                    plan,
                    Path(destination),
                    chosen,
                    overwrite=overwrite,
                    progress=renewing,
                    spelling=spelling,
                )
            return export_plan(
                self,
                plan,
                Path(destination),
                chosen,
                overwrite=overwrite,
                check_logits=check_logits,
                progress=renewing,
                spelling=spelling,
            )
