"""Settings of data, loading and augmentation; names and defaults are timm's where timm's train.py has them."""

from dataclasses import dataclass

from ccl_timm.console.arguments import COUNT, FRACTION, PROBABILITY, SHARE, WORKERS, integer, real
from ccl_timm.console.options import Options, option

__all__ = ['AugmentConfig', 'DataConfig', 'LoaderConfig']


_MODES = ('L', 'LA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'HSV')  # of Pillow, a byte for each channel


@dataclass(frozen=True, kw_only=True)
class DataConfig(Options, title='data'):
    """Which images, how they are split, and how classes are numbered."""

    data_dir: str | None = option(
        None, metavar='DIR', varies='budget', help='folder with train/ and validation/, one folder per class in each'
    )
    dataset: str = option('', metavar='NAME', help="'digits', 'torch/mnist', 'hfds/owner/name', ...; empty: folder")
    train_split: str = option('train', metavar='NAME', help='name of the training split')
    val_split: str = option('validation', metavar='NAME', help="name of the validation split; '' for none")
    val_fraction: float | None = option(
        None, SHARE, metavar='F', own=True, help='hold out this share of each training class'
    )
    train_fraction: float | None = option(
        None, SHARE, metavar='F', own=True, varies='budget', help='train on this share of each class only'
    )
    dataset_download: bool = option(False, varies='seed', help='let torch/ data sets download themselves')
    class_map: str = option(
        '', metavar='FILE', varies='nothing', help='class names, one per line, in the order of their numbers'
    )
    class_names: list[str] | None = option(
        None, nargs='+', metavar='NAME', own=True, varies='nothing', help='class names themselves; args.yaml has them'
    )
    num_classes: int | None = option(
        None, COUNT, metavar='N', varies='nothing', help='default: as many as the data has'
    )
    input_img_mode: str | None = option(
        None,
        choices=_MODES,
        metavar='MODE',
        help="Pillow's colour mode of images, default 'RGB', or 'L' for one channel",
    )
    input_key: str | None = option(None, help='column of images (hfds/)')
    target_key: str | None = option(None, help='column of labels (hfds/)')
    batch_size: int = option(128, COUNT, '-b', metavar='N', help='images per step and process')
    seed: int = option(42, integer(0), varies='seed', help='of splits, order, augmentation and initial weights')


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Options, title='augmentation'):
    """How training images are changed at random, and mixed."""

    no_aug: bool = option(False, help='no augmentation')
    pad_crop: int = option(
        0, integer(0), metavar='PX', own=True, help='zero-pad and crop at random instead of resized crops'
    )
    train_crop_mode: str | None = option(None, choices=('rrc', 'rkrc', 'rkrr'))
    scale: list[float] = option([0.08, 1.0], real(0, 4, above=True), nargs=2)
    ratio: list[float] = option([3.0 / 4.0, 4.0 / 3.0], real(0, 100, above=True), nargs=2)
    hflip: float = option(0.5, PROBABILITY)
    vflip: float = option(0.0, PROBABILITY)
    color_jitter: float = option(0.4, real(0, 10))
    color_jitter_prob: float | None = option(None, PROBABILITY)
    grayscale_prob: float | None = option(None, PROBABILITY)
    gaussian_blur_prob: float | None = option(None, PROBABILITY)
    aa: str | None = option(None, metavar='POLICY', help='AutoAugment or RandAugment')
    reprob: float = option(0.0, PROBABILITY, help='random erasing')
    remode: str = option('pixel')
    recount: int = option(1, integer(1, 1000))
    mixup: float = option(0.0, real(0, 100))
    cutmix: float = option(0.0, real(0, 100))
    cutmix_minmax: list[float] | None = option(None, PROBABILITY, nargs=2)
    mixup_prob: float = option(1.0, PROBABILITY)
    mixup_switch_prob: float = option(0.5, PROBABILITY)
    mixup_mode: str = option('batch', choices=('batch', 'pair', 'elem'))
    mixup_off_epoch: int = option(0, integer(0))
    train_interpolation: str = option('random')

    @property
    def mixes(self) -> bool:
        """Whether Mixup or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


@dataclass(frozen=True, kw_only=True)
class LoaderConfig(AugmentConfig, DataConfig, title='loading'):
    """Data, augmentation, and how images become batches."""

    validation_batch_size: int | None = option(None, COUNT, '-vb', metavar='N', varies='budget')
    samples_per_class: int | None = option(
        None, COUNT, metavar='K', own=True, help='batches of B/K classes with K images each'
    )
    in_memory: str = option(
        'auto', choices=('auto', 'on', 'disk', 'off'), own=True, varies='budget',
        help='keep images decoded in memory (on) or in the cache on disk; auto: small data sets and image files',
    )  # fmt: skip
    workers: int = option(4, WORKERS, '-j', metavar='N', varies='nothing', help='loader processes; 0 for none')
    pin_mem: bool = option(False, varies='nothing')
    smoothing: float = option(0.1, FRACTION, metavar='F', help='label smoothing, for losses that have it')
