"""The gallery: pictures drawn from result files that are kept in the repository, and the step that makes those files."""

from mansu_tl.gallery.collect import collect
from mansu_tl.gallery.pictures import Picture, pictures
from mansu_tl.gallery.write import figure_data, write_gallery

__all__ = ["Picture", "collect", "figure_data", "pictures", "write_gallery"]


def __dir__() -> list[str]:
    return sorted(__all__)
