"""The classifier as a feature extractor of torch-fidelity. Importing this module registers it by the name CLASSIFIER."""

from pathlib import Path

from torch import Tensor

from uni_instruct.evaluate.classifier import open_features
from uni_instruct.evaluate.fidelity import fidelity

CLASSIFIER = "uni-instruct-classifier"
_fidelity = fidelity()
_LAYERS = ("features", "logits")


class ClassifierExtractor(_fidelity.FeatureExtractorBase):  # type: ignore[name-defined]
    """The layers 'features' and 'logits' of the classifier in the file feature_extractor_weights_path."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **options: object):
        # torch-fidelity passes `options` to every extractor, such as whether to compile it. This one needs none of them.
        super().__init__(name, features_list)
        self.network = open_features(Path(feature_extractor_weights_path))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """The names of the layers."""
        return _LAYERS

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The inception score reads logits, every other metric features."""
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        """False: the network is too small to gain from compiling."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> None:
        """None, since the network cannot be compiled."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The requested layers' outputs for images uint8 [B, C, H, W], in the order of the request."""
        outputs = dict(zip(_LAYERS, self.network(images), strict=True))
        return tuple(outputs[layer] for layer in self.features_list)


_fidelity.register_feature_extractor(CLASSIFIER, ClassifierExtractor)
