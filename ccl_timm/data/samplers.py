"""In which order a training script sees images."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from ccl_timm.errors import UserError

__all__ = ['ClassBalancedSampler']


class ClassBalancedSampler(Sampler[int]):
    """Batches of P classes with K images each, so that terms over pairs of one class have pairs (our assumption).

    Classes come in random order, each once before any comes again, so that rare classes are seen as often as frequent
    ones. So do the images of a class. An epoch has as many batches as without balancing. The order depends on
    the seed and the epoch only; processes take turns with the batches.

    Args:
        targets: class of each image, (N,) numbers.
        batch_size: images a batch and process, P x K.
        samples_per_class: K.
        seed: of the order.
        rank: number of this process.
        world_size: how many processes there are.

    Raises:
        UserError: K does not divide the batch, or a batch has more classes than there are.
    """

    def __init__(
        self,
        targets: Sequence[int],
        batch_size: int,
        samples_per_class: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.images_of = [torch.tensor([i for i, t in enumerate(targets) if t == k]) for k in sorted(set(targets))]
        self.classes_per_batch, rest = divmod(batch_size, samples_per_class)
        if rest or self.classes_per_batch > len(self.images_of):
            raise UserError(
                f'--samples-per-class {samples_per_class} does not make batches of {batch_size} out of '
                f'{len(self.images_of)} classes: --batch-size must be a multiple of it, by at most the number of '
                'classes.'
            )
        self.samples_per_class, self.seed, self.rank, self.world_size = samples_per_class, seed, rank, world_size
        self.batches = len(targets) // (batch_size * world_size)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Tell that an epoch (0-based) begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches * self.classes_per_batch * self.samples_per_class

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        classes = _Deck(torch.arange(len(self.images_of)), generator)
        images = [_Deck(indices, generator) for indices in self.images_of]
        for batch in range(self.batches * self.world_size):
            chosen = classes.draw(self.classes_per_batch)
            indices = [i for k in chosen for i in images[k].draw(self.samples_per_class)]
            if batch % self.world_size == self.rank:
                yield from indices


class _Deck:
    """Cards that are drawn in random order, and shuffled anew when they run out; a hand has none twice if it can."""

    def __init__(self, cards: torch.Tensor, generator: torch.Generator):
        self.cards, self.generator = cards, generator
        self.left: list[int] = []

    def draw(self, count: int) -> list[int]:
        hand, self.left = self.left[:count], self.left[count:]
        while len(hand) < count:
            fresh = self.cards[torch.randperm(len(self.cards), generator=self.generator)].tolist()
            taken = set(hand)
            fresh.sort(key=taken.__contains__)  # those in the hand already come last; the sort keeps the others' order
            missing = count - len(hand)
            hand, self.left = hand + fresh[:missing], fresh[missing:]
        return hand
