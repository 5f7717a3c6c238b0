"""The names of all logged values, with meaning and unit."""

from collections.abc import Mapping

KEYS = {
    "step": "optimizer steps done",
    "epoch": "passes over the data done, as a fraction",
    "loss": "of the last step, over the global batch",
    "lr": "learning rate of the last step",
    "ema_momentum": "momentum of the target weights in the last step",
    "images_per_s": "images of the global batch a second, since the last line",
    "data_wait_s": "seconds a step that the loop waited for data, since the last line",
    "effective_rank/online": "directions the online output uses, after any softmax",
    "effective_rank/target": "directions the target's use, after the filter or softmax",
    "effective_rank/projection": "directions the projections use, before filter or softmax",
    "effective_rank/share": "of the projections, as a share of the most that the batch can show",
    "rank_difference": "effective rank of the target minus that of the online branch",
    "rank_difference/ema": "part of it that the older target weights make; DINO and SwAV",
    "rank_difference/sharpening": "part that the lower temperature of the targets makes",
    "rank_difference/centring": "part that the center makes; the three parts add up",
    "rank_difference/equipartition": "the same for Sinkhorn",
    "effective_rank/logits_online": "of DINO's and SwAV's online logits, before the softmax",
    "effective_rank/logits_target": "of the target's, minus the center",
    "effective_rank/online_centred": "of the online output minus its mean row",
    "effective_rank/target_centred": "of the target's output minus its mean row",
    "perplexity/online": "prototypes that the online branch uses, exp of the mean row's entropy",
    "perplexity/target": "prototypes that the targets use",
    "entropy/online": "mean entropy of an online row over ln K: 0 is one-hot, 1 uniform",
    "entropy/target": "mean entropy of a target row over ln K",
    "kl": "mean KL divergence of the online output from the targets: the loss minus their entropy",
    "teacher_temp": "temperature of DINO's targets, or SwAV's epsilon",
    "center_norm": "Euclidean norm of DINO's center",
    "std": "of the normalized projections times sqrt(D): 1 is spread out, 0 is collapse",
    "alignment": "of the two branches' eigenvectors, 0 to 1, at steps of --log.spectrum-every",
    "knn_top1": "accuracy of a kNN classifier on embeddings, in percent",
    "knn_top1_target": "the same on embeddings of the target weights, if the method has any",
    "probe_top1": "accuracy of a linear probe on embeddings, in percent",
    "grad_norm": "Euclidean norm of the whole gradient",
    "skipped_steps": "steps skipped so far because something was not finite",
    "filter_failures": "batches so far on which filter.engine=gemm was not accurate",
    "warning": "a sentence from the collapse guard",
    "gpu_mem_gib": "most GPU memory used so far, GiB",
}

Value = float | int | str | None
Metrics = Mapping[str, Value]
