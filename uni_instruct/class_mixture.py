"""Classes between two others: what an engine takes in place of class ids where an image is to be a mixture. NumPy only."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class ClassMixture:
    """The class of each image, between two: class_ids and other_ids int64 [B], share float32 [B] in [0, 1].

    Image i is of class class_ids[i] at share 0, to the byte, and of other_ids[i] at share 1. Between them the network's
    embeddings of both are interpolated: e = (1 - share) e(class_ids) + share e(other_ids). Stands wherever class ids do.
    """

    class_ids: np.ndarray
    other_ids: np.ndarray
    share: np.ndarray

    @classmethod
    def of(cls, class_ids: np.ndarray) -> "ClassMixture":
        """Those classes, unmixed: class_ids int64 [B]."""
        return cls(class_ids, class_ids, np.zeros(len(class_ids), np.float32))

    def __len__(self) -> int:
        return len(self.class_ids)

    def __getitem__(self, rows: slice | np.ndarray) -> "ClassMixture":
        """The classes of those images, so that a mixture is cut into batches as ids are."""
        return ClassMixture(self.class_ids[rows], self.other_ids[rows], self.share[rows])

    def simplified(self) -> "ClassIds":
        """The ids alone where no image is mixed: what then runs does nothing for mixtures."""
        return self if self.share.any() else self.class_ids

    def arrays(self) -> dict[str, np.ndarray]:
        """The three by name."""
        return {"class_ids": self.class_ids, "other_ids": self.other_ids, "share": self.share}


# What says of which class each image is: ids int64 [B], or mixtures of two.
ClassIds = np.ndarray | ClassMixture
