"""Evaluation of guides: statistics of result trees, verdicts on them, remedies, and a report."""

from calibrant.calls import own_calls
from calibrant.evaluation.checking import Check, check
from calibrant.evaluation.judgements.against_reference import verdicts
from calibrant.evaluation.judgements.conclusion import Conclusion, conclude
from calibrant.evaluation.judgements.decisions import Verdict
from calibrant.evaluation.judgements.on_contrast import contrast_verdicts
from calibrant.evaluation.judgements.on_predictions import predictive_sentences
from calibrant.evaluation.judgements.on_probabilities import probability_verdicts
from calibrant.evaluation.remedying.sentences import remedy_sentences
from calibrant.evaluation.remedying.trying import remedies
from calibrant.evaluation.reporting.application_plots import credible_figure, learning_figure, safe_retrieval_figure
from calibrant.evaluation.reporting.contrast_plots import bins_figure, contrast_figure
from calibrant.evaluation.reporting.corruption_plots import corruption_figure
from calibrant.evaluation.reporting.embedding_plots import certainty_figure, embedding_map_figure
from calibrant.evaluation.reporting.interpolation_plots import interpolation_figure
from calibrant.evaluation.reporting.page import report
from calibrant.evaluation.reporting.predictive_plots import coverage_figure
from calibrant.evaluation.reporting.rate_plots import rate_distortion_figure
from calibrant.evaluation.reporting.reliability_plots import reliability_figure
from calibrant.evaluation.reporting.representation_plots import match_figure, reject_figure
from calibrant.evaluation.reporting.response_plots import bow_tie_figure, divisive_figure, fields_figure
from calibrant.evaluation.reporting.score_plots import label_entropy_figure, score_figure
from calibrant.evaluation.representations.acquiring import active_learning
from calibrant.evaluation.representations.comparing import retrieval_difference
from calibrant.evaluation.representations.conflicts import gradient_conflict
from calibrant.evaluation.representations.credible import credible_retrieval
from calibrant.evaluation.representations.cropping import crop_shares, crop_test, cropped
from calibrant.evaluation.representations.distances import feature_distance
from calibrant.evaluation.representations.few_shots import few_shot
from calibrant.evaluation.representations.inputs import Embedded
from calibrant.evaluation.representations.match_probabilities import match_calibration
from calibrant.evaluation.representations.neighbours import Neighbours, nearest_neighbours
from calibrant.evaluation.representations.novelty import mixed_retrieval, ood_auroc
from calibrant.evaluation.representations.overview import representation_metrics
from calibrant.evaluation.representations.pairing import uncertainty_pair
from calibrant.evaluation.representations.people import human_entropy
from calibrant.evaluation.representations.recall import retrieval
from calibrant.evaluation.representations.rejecting import reject_curve
from calibrant.evaluation.representations.safe import safe_retrieval
from calibrant.evaluation.representations.second_views import second_view_posterior
from calibrant.evaluation.representations.third_views import second_view_experiment
from calibrant.evaluation.results import RunResult
from calibrant.evaluation.statistics.classifier import c2st
from calibrant.evaluation.statistics.comparison import compare
from calibrant.evaluation.statistics.entry_calibration import pixel_calibration
from calibrant.evaluation.statistics.frechet import frechet_distance
from calibrant.evaluation.statistics.gaps import gap
from calibrant.evaluation.statistics.informed import informed_directions
from calibrant.evaluation.statistics.label_probabilities import predicted_probabilities
from calibrant.evaluation.statistics.mutual_information import information
from calibrant.evaluation.statistics.overlaying import side_by_side
from calibrant.evaluation.statistics.posterior_ranks import posterior_calibration
from calibrant.evaluation.statistics.predictive_tests import predictive_check
from calibrant.evaluation.statistics.ranks import pit
from calibrant.evaluation.statistics.rates import rate_distortion
from calibrant.evaluation.statistics.simulation_ranks import calibration, uniformity
from calibrant.evaluation.statistics.usage import active_units
from calibrant.evaluation.uncertainty.aggregates import aggregate_posterior
from calibrant.evaluation.uncertainty.aurocs import auroc_difference
from calibrant.evaluation.uncertainty.average_image import average_image_experiment
from calibrant.evaluation.uncertainty.bins import contrast_bins
from calibrant.evaluation.uncertainty.bow_ties import bow_tie
from calibrant.evaluation.uncertainty.class_means import class_mean_images, class_pairs
from calibrant.evaluation.uncertainty.contrast import contrast_experiment
from calibrant.evaluation.uncertainty.corruption import corruption_experiment
from calibrant.evaluation.uncertainty.corruptions import corrupted, shuffled_across_images
from calibrant.evaluation.uncertainty.divisive import divisive_normalisation, filter_responses, weights_distance
from calibrant.evaluation.uncertainty.fields import receptive_fields, white_noise_fields
from calibrant.evaluation.uncertainty.given import binned_moments, posterior_moments
from calibrant.evaluation.uncertainty.interpolation import interpolation_experiment
from calibrant.evaluation.uncertainty.labels import label_entropy
from calibrant.evaluation.uncertainty.means import posterior_means
from calibrant.evaluation.uncertainty.outside import ood_experiment
from calibrant.evaluation.uncertainty.projections import projective_fields
from calibrant.evaluation.uncertainty.reading import label_read_out
from calibrant.inference.reweighting import weights

__all__ = [
    "Check",
    "Conclusion",
    "Embedded",
    "Neighbours",
    "RunResult",
    "Verdict",
    "active_learning",
    "active_units",
    "aggregate_posterior",
    "auroc_difference",
    "average_image_experiment",
    "binned_moments",
    "bins_figure",
    "bow_tie",
    "bow_tie_figure",
    "c2st",
    "calibration",
    "certainty_figure",
    "check",
    "class_mean_images",
    "class_pairs",
    "compare",
    "conclude",
    "contrast_bins",
    "contrast_experiment",
    "contrast_figure",
    "contrast_verdicts",
    "corrupted",
    "corruption_experiment",
    "corruption_figure",
    "coverage_figure",
    "credible_figure",
    "credible_retrieval",
    "crop_shares",
    "crop_test",
    "cropped",
    "divisive_figure",
    "divisive_normalisation",
    "embedding_map_figure",
    "feature_distance",
    "few_shot",
    "fields_figure",
    "filter_responses",
    "frechet_distance",
    "gap",
    "gradient_conflict",
    "human_entropy",
    "information",
    "informed_directions",
    "interpolation_experiment",
    "interpolation_figure",
    "label_entropy",
    "label_entropy_figure",
    "label_read_out",
    "learning_figure",
    "match_calibration",
    "match_figure",
    "mixed_retrieval",
    "nearest_neighbours",
    "ood_auroc",
    "ood_experiment",
    "pit",
    "pixel_calibration",
    "posterior_calibration",
    "posterior_means",
    "posterior_moments",
    "predicted_probabilities",
    "predictive_check",
    "predictive_sentences",
    "probability_verdicts",
    "projective_fields",
    "rate_distortion",
    "rate_distortion_figure",
    "receptive_fields",
    "reject_curve",
    "reject_figure",
    "reliability_figure",
    "remedies",
    "remedy_sentences",
    "report",
    "representation_metrics",
    "retrieval",
    "retrieval_difference",
    "safe_retrieval",
    "safe_retrieval_figure",
    "score_figure",
    "second_view_experiment",
    "second_view_posterior",
    "shuffled_across_images",
    "side_by_side",
    "uncertainty_pair",
    "uniformity",
    "verdicts",
    "weights",
    "weights_distance",
    "white_noise_fields",
]

globals().update(own_calls(__name__, globals(), __all__))


def __dir__() -> list[str]:
    return sorted(__all__)
