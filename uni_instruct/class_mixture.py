"""Mixtures of two classes, which an engine takes in place of class ids. NumPy only."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class ClassMixture:
    """A mixture of two classes for each image: class_ids and other_ids int64 [B], share float32 [B] in [0, 1].

    The network's embeddings of both classes are interpolated: e = (1 - share) e(class_ids) + share e(other_ids). At share 0
    image i is exactly the image of class class_ids[i]; at share 1, of other_ids[i]. Accepted wherever class ids are.
    """

    class_ids: np.ndarray
    other_ids: np.ndarray
    share: np.ndarray

    @classmethod
    def of(cls, class_ids: np.ndarray) -> "ClassMixture":
        """Plain classes as mixtures of share 0: class_ids int64 [B]."""
        return cls(class_ids, class_ids, np.zeros(len(class_ids), np.float32))

    def __len__(self) -> int:
        return len(self.class_ids)

    def __getitem__(self, rows: slice | np.ndarray) -> "ClassMixture":
        """The mixtures of those images, so that batches are sliced in the same way as class ids."""
        return ClassMixture(self.class_ids[rows], self.other_ids[rows], self.share[rows])

    def simplified(self) -> "ClassIds":
        """The plain ids if every share is 0, so that engines skip the work for mixtures; else self."""
        return self if self.share.any() else self.class_ids

    def arrays(self) -> dict[str, np.ndarray]:
        """The three arrays by field name."""
        return {"class_ids": self.class_ids, "other_ids": self.other_ids, "share": self.share}


# The class of each image: ids int64 [B], or mixtures of two classes.
ClassIds = np.ndarray | ClassMixture
