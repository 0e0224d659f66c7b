"""Which image belongs to which mask, and which of them are for training. Nothing here opens an image."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from cdkd_edge.core.errors import DatasetError
from cdkd_edge.quality.datasets import Dataset, find_dataset, split_dataset


def files(folder: Path, *names: str) -> Path:
    """Empty files: only their names matter."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def folder_pair(folder: Path, *stems: str) -> Path:
    return files(folder, *(f"images/{stem}.jpg" for stem in stems), *(f"masks/{stem}.png" for stem in stems))


def loveda(folder: Path, *names: str) -> Path:
    """``Train/Urban/7`` becomes an image and its mask."""
    for name in names:
        place, _, stem = name.rpartition("/")
        files(folder, f"{place}/images_png/{stem}.png", f"{place}/masks_png/{stem}.png")
    return folder


def listing(folder: Path, *lines: str) -> Path:
    path = folder / "some.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def names(dataset: Dataset) -> list[str]:
    return [pair.name for pair in dataset]


# --- layouts --------------------------------------------------------------------------------------


def test_a_folder_pair(tmp_path: Path) -> None:
    dataset = find_dataset(folder_pair(tmp_path, "tile2_b", "tile1_b", "tile1_a"))
    assert dataset.layout == "folder pair"
    assert names(dataset) == ["tile1_a", "tile1_b", "tile2_b"]
    assert dataset.scenes == ("tile1", "tile2")
    first = next(iter(dataset))
    assert (first.image, first.mask) == (tmp_path / "images/tile1_a.jpg", tmp_path / "masks/tile1_a.png")
    assert len(dataset) == 3


def test_a_folder_pair_one_level_down(tmp_path: Path) -> None:
    folder_pair(tmp_path / "Tile 1", "part_1", "part_2")
    folder_pair(tmp_path / "Tile 2", "part_1")
    files(tmp_path / "Tile 3", "images/part_1.jpg")  # test images come without masks; they are not meant
    dataset = find_dataset(tmp_path)
    assert dataset.layout == "folder pair"
    assert names(dataset) == ["Tile 1/part_1", "Tile 1/part_2", "Tile 2/part_1"]
    assert dataset.scenes == ("Tile 1", "Tile 2")


@pytest.mark.parametrize("below", [".", "train"])
def test_deepglobe(tmp_path: Path, below: str) -> None:
    files(tmp_path / below, "119_sat.jpg", "119_mask.png", "7_sat.jpg", "7_mask.png")
    files(tmp_path / "valid", "8_sat.jpg")  # published without masks
    dataset = find_dataset(tmp_path)
    assert dataset.layout == "DeepGlobe"
    assert names(dataset) == ["119", "7"]
    assert dataset.scenes == ("119", "7"), "every image is a scene of its own"
    assert dataset.pairs[0].mask == tmp_path / below / "119_mask.png"
    assert dataset.schema_name == "deepglobe"


def test_loveda(tmp_path: Path) -> None:
    loveda(tmp_path, "Val/Rural/9", "Train/Urban/7", "Train/Rural/8")
    files(tmp_path / "Test/Urban", "images_png/5.png")  # published without masks
    dataset = find_dataset(tmp_path)
    assert dataset.layout == "LoveDA"
    assert names(dataset) == ["Train/Rural/8", "Train/Urban/7", "Val/Rural/9"]
    assert dataset.scenes == ("Train", "Val")
    assert dataset.schema_name == "loveda"


@pytest.mark.parametrize("part", ["Train", "Val"])
def test_loveda_with_one_part_or_from_within_it(tmp_path: Path, part: str) -> None:
    loveda(tmp_path, f"{part}/Urban/7", f"{part}/Rural/7")
    above, within = find_dataset(tmp_path), find_dataset(tmp_path / part)
    assert (above.layout, within.layout) == ("LoveDA", "LoveDA")
    assert names(above) == [f"{part}/Rural/7", f"{part}/Urban/7"]
    assert names(within) == ["Rural/7", "Urban/7"], "one number, two images: the folder tells them apart"
    assert above.scenes == (part,)


@pytest.mark.parametrize(
    ("images", "masks", "parts"),
    [("img_dir", "ann_dir", ("train", "val")), ("images", "annotations", ("training", "validation"))],
)
def test_openmmlab(tmp_path: Path, images: str, masks: str, parts: tuple[str, str]) -> None:
    for part in parts:
        files(tmp_path, f"{images}/{part}/1.jpg", f"{masks}/{part}/1.png")
    files(tmp_path, f"{images}/test/9.jpg")  # published without masks
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, names(dataset)) == ("OpenMMLab", [f"{part}/1" for part in parts])
    split = split_dataset(dataset)
    assert (names(split.training), names(split.validation)) == ([f"{parts[0]}/1"], [f"{parts[1]}/1"])
    files(tmp_path, f"{images}/{parts[0]}/2.jpg")
    with pytest.raises(DatasetError, match=f"1 of 2 images .*{parts[0]} have no mask"):
        find_dataset(tmp_path)


@pytest.mark.parametrize(
    ("image", "mask"), [("_leftImg8bit", "_gtFine_labelTrainIds"), ("", "_instance_color_RGB"), ("_sat", "")]
)
def test_an_ending_that_all_masks_share_is_not_of_the_name(tmp_path: Path, image: str, mask: str) -> None:
    for name in ("a_1", "b_2"):
        files(tmp_path, f"images/{name}{image}.png", f"masks/{name}{mask}.png")
    assert names(find_dataset(tmp_path)) == ["a_1", "b_2"]
    files(tmp_path, f"images/c_3{image}.png")
    with pytest.raises(DatasetError, match="have no mask"):
        find_dataset(tmp_path)


def test_numbers_at_the_end_tell_images_apart(tmp_path: Path) -> None:
    files(tmp_path, "images/a_1.png", "images/b_1.png", "masks/a_2.png", "masks/b_2.png")
    with pytest.raises(DatasetError, match="have no mask"):
        find_dataset(tmp_path)


def test_file_names_with_dots_spaces_and_capitals(tmp_path: Path) -> None:
    files(tmp_path / "images", "Tile 1.v2_a b.JPG", "île_1.TIFF", "_x.jp2")
    files(tmp_path / "masks", "Tile 1.v2_a b.PNG", "île_1.Tif", "_x.png")
    dataset = find_dataset(tmp_path)
    assert sorted(names(dataset)) == sorted(["Tile 1.v2_a b", "île_1", "_x"])
    assert set(dataset.scenes) == {"Tile 1.v2", "île", ""}


def test_hidden_files_and_other_files_are_left_alone(tmp_path: Path) -> None:
    folder_pair(tmp_path / "a", "one")
    files(tmp_path / "a", "images/._one.jpg", "images/.b.jpg", "images/Thumbs.db", "images/one.jpg.aux.xml", "README")
    files(tmp_path / "a", "masks/._one.png", "masks/classes.txt", "masks/one.jgw")
    assert names(find_dataset(tmp_path / "a")) == ["one"]
    files(tmp_path / "b", "1_sat.jpg", "1_mask.png", "._1_sat.jpg", "._1_mask.png", "metadata.csv", "2_sat.txt")
    assert names(find_dataset(tmp_path / "b")) == ["1"]


def test_a_hidden_folder_is_no_dataset(tmp_path: Path) -> None:
    folder_pair(tmp_path / ".trash", "old")
    with pytest.raises(DatasetError, match="no labelled images"):
        find_dataset(tmp_path)
    folder_pair(tmp_path / "city", "new")
    assert names(find_dataset(tmp_path)) == ["city/new"]


def test_links_to_images_are_images(tmp_path: Path) -> None:
    folder_pair(tmp_path / "a", "one")
    (tmp_path / "b").mkdir()
    for part in ("images", "masks"):
        (tmp_path / "b" / part).symlink_to(tmp_path / "a" / part)
    assert names(find_dataset(tmp_path / "b")) == ["one"]


def test_the_schema_beside_the_data_goes_before_that_of_the_layout(tmp_path: Path) -> None:
    assert find_dataset(folder_pair(tmp_path / "pair", "a")).schema_name is None
    files(tmp_path / "pair", "schema.toml")
    assert find_dataset(tmp_path / "pair").schema_name == str(tmp_path / "pair/schema.toml")
    files(tmp_path / "globe", "1_sat.jpg", "1_mask.png", "schema.toml")
    assert find_dataset(tmp_path / "globe").schema_name == str(tmp_path / "globe/schema.toml")


# --- what does not fit together -------------------------------------------------------------------


def test_an_image_without_a_mask(tmp_path: Path) -> None:
    folder_pair(tmp_path, "a", "b")
    files(tmp_path, *(f"images/lonely{i}.jpg" for i in range(7)))
    with pytest.raises(DatasetError, match=r"7 of 9 images .*lonely0, .*lonely4 and 2 more$") as raised:
        find_dataset(tmp_path)
    assert ".tif" in (raised.value.hint or "")


def test_a_mask_without_an_image(tmp_path: Path) -> None:
    files(folder_pair(tmp_path, "a"), "masks/b.png")
    with pytest.raises(DatasetError, match=r"1 of 2 masks .* have no image .*: b$"):
        find_dataset(tmp_path)


def test_a_jpeg_is_no_mask(tmp_path: Path) -> None:
    files(tmp_path, "images/a.jpg", "masks/a.jpg")
    with pytest.raises(DatasetError, match="no mask"):
        find_dataset(tmp_path)


@pytest.mark.parametrize("twice", ["images/a.png", "masks/a.tif"])
def test_two_files_of_one_stem(tmp_path: Path, twice: str) -> None:
    files(folder_pair(tmp_path, "a"), twice)
    with pytest.raises(DatasetError, match=r"holds both a\.\w+ and a\.\w+"):
        find_dataset(tmp_path)


@pytest.mark.parametrize("twice", ["1_sat.tif", "1_mask.tif"])
def test_two_files_of_one_deepglobe_number(tmp_path: Path, twice: str) -> None:
    files(tmp_path, "1_sat.jpg", "1_mask.png", twice)
    with pytest.raises(DatasetError, match=r"holds both 1_\w+\.\w+ and 1_\w+\.\w+"):
        find_dataset(tmp_path)


def test_counterparts_in_deepglobe_and_loveda(tmp_path: Path) -> None:
    files(tmp_path / "globe", "1_sat.jpg", "1_mask.png", "2_sat.jpg")
    with pytest.raises(DatasetError, match=r"1 of 2 images .*: 2$"):
        find_dataset(tmp_path / "globe")
    files(loveda(tmp_path / "love", "Train/Urban/7"), "Train/Urban/masks_png/8.png")
    with pytest.raises(DatasetError, match=r"1 of 2 masks .*: 8$"):
        find_dataset(tmp_path / "love")


def test_images_without_a_folder_of_masks(tmp_path: Path) -> None:
    files(tmp_path, "images/a.jpg")
    with pytest.raises(DatasetError, match="no folder masks/ beside it"):
        find_dataset(tmp_path)


def test_empty_folders(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    with pytest.raises(DatasetError, match=r"folder pair layout\) has no images"):
        find_dataset(tmp_path)


def test_no_layout_that_we_know(tmp_path: Path) -> None:
    files(tmp_path, "a.jpg", "b.png")
    with pytest.raises(DatasetError, match="no labelled images in a known layout") as raised:
        find_dataset(tmp_path)
    for layout in ("images/", "ID_sat.jpg", "Train/"):
        assert layout in (raised.value.hint or "")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        find_dataset(tmp_path / "nowhere")
    files(tmp_path, "file")
    with pytest.raises(DatasetError, match="is not a folder"):
        find_dataset(tmp_path / "file")


# --- choosing -------------------------------------------------------------------------------------


def test_scenes_are_chosen_whole(tmp_path: Path) -> None:
    dataset = find_dataset(folder_pair(tmp_path, "t1_a", "t1_b", "t10_a", "t2_a"))
    chosen = dataset.of_scenes(["t1", "t2"])
    assert names(chosen) == ["t1_a", "t1_b", "t2_a"]
    assert (chosen.folder, chosen.layout) == (dataset.folder, dataset.layout)
    with pytest.raises(DatasetError, match=r"no scene T1, t3$") as raised:
        dataset.of_scenes(["t1", "t3", "T1"])
    assert raised.value.hint == "its scenes are t1, t10, t2"


def test_a_list_takes_names_file_names_and_paths(tmp_path: Path) -> None:
    dataset = find_dataset(folder_pair(tmp_path, "a_1", "b.v2", "c 3", "d", "e"))
    chosen = dataset.of_list(
        listing(
            tmp_path, "d.png  # the mask's name will do", "", "# a whole line", "  a_1", "b.v2", "images/c 3.jpg\t", ""
        )
    )
    assert names(chosen) == ["a_1", "b.v2", "c 3", "d"], "in order of name, whatever the order of lines"
    assert names(dataset.of_list(listing(tmp_path, "b.v2.JPG", str(tmp_path / "images/e.jpg")))) == ["b.v2", "e"]


def test_a_list_made_on_windows(tmp_path: Path) -> None:
    dataset = find_dataset(folder_pair(tmp_path, "a", "b"))
    path = tmp_path / "some.txt"
    path.write_bytes("a\r\nb\r\n".encode("utf-8-sig"))
    assert names(dataset.of_list(path)) == ["a", "b"]


def test_a_list_names_deepglobe_images_by_number_or_file(tmp_path: Path) -> None:
    dataset = find_dataset(files(tmp_path, *(f"{i}_{kind}" for i in range(4) for kind in ("sat.jpg", "mask.png"))))
    assert names(dataset.of_list(listing(tmp_path, "0", "1_sat", "2_sat.jpg", "train/3_sat.jpg"))) == list("0123")


@pytest.mark.parametrize("entry", ["Train/Urban/7", "LoveDA/Train/Urban/7.png", "Train/Urban/images_png/7.png"])
def test_a_path_tells_images_of_one_file_name_apart(tmp_path: Path, entry: str) -> None:
    dataset = find_dataset(loveda(tmp_path, "Train/Urban/7", "Train/Rural/7", "Val/Urban/7"))
    assert names(dataset.of_list(listing(tmp_path, entry))) == ["Train/Urban/7"]


def test_the_path_of_an_image_names_it(tmp_path: Path) -> None:
    folder_pair(tmp_path / "train", "1", "2")
    folder_pair(tmp_path / "val", "1", "2")
    dataset = find_dataset(tmp_path)
    for pair in dataset:
        assert dataset.of_list(listing(tmp_path, str(pair.image))).pairs == (pair,)
        assert dataset.of_list(listing(tmp_path, str(pair.image.relative_to(tmp_path)))).pairs == (pair,)


def test_a_name_that_could_be_several_images(tmp_path: Path) -> None:
    dataset = find_dataset(loveda(tmp_path, "Train/Urban/7", "Train/Rural/7", "Val/Urban/8"))
    with pytest.raises(DatasetError, match=r"names 7\.png, which could be 2 images of"):
        dataset.of_list(listing(tmp_path, "8", "7.png"))
    assert names(dataset.of_list(listing(tmp_path, "8"))) == ["Val/Urban/8"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("a", "x"), "names x, which is not in"),
        (("a", "b", "images/a.jpg"), r"names images/a\.jpg twice"),
        (("", "  # nothing", ""), "names no image"),
        ((), "names no image"),
        (("/",), "names /, which is not in"),
        (("..",), r"names \.\., which is not in"),
        (("A",), "is not in"),
    ],
)
def test_lists_that_do_not_say_what_they_mean(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    dataset = find_dataset(folder_pair(tmp_path, "a", "b"))
    with pytest.raises(DatasetError, match=message):
        dataset.of_list(listing(tmp_path, *lines))


def test_lists_that_cannot_be_read(tmp_path: Path) -> None:
    dataset = find_dataset(folder_pair(tmp_path, "a"))
    with pytest.raises(DatasetError, match="cannot be read: No such file"):
        dataset.of_list(tmp_path / "nowhere.txt")
    with pytest.raises(DatasetError, match="cannot be read: Is a directory"):
        dataset.of_list(tmp_path)
    (tmp_path / "binary.txt").write_bytes(b"a\n\xff\xfe")
    with pytest.raises(DatasetError, match="cannot be read: not UTF-8"):
        dataset.of_list(tmp_path / "binary.txt")
    with pytest.raises(DatasetError, match="cannot be read: larger than"):
        dataset.of_list(Path("/dev/zero"))


# --- splits ---------------------------------------------------------------------------------------


@pytest.fixture
def tiles(tmp_path: Path) -> Dataset:
    return find_dataset(folder_pair(tmp_path / "tiles", "t1_a", "t1_b", "t2_a", "t3_a"))


@pytest.mark.parametrize(
    ("training", "validation", "sides"),
    [
        (("t1",), ("t3",), (["t1_a", "t1_b"], ["t3_a"])),
        ((), ("t2",), (["t1_a", "t1_b", "t3_a"], ["t2_a"])),
        (("t2", "t1"), (), (["t1_a", "t1_b", "t2_a"], ["t3_a"])),
    ],
)
def test_a_split_by_scenes_gives_the_rest_to_the_other_side(
    tiles: Dataset, training: tuple[str, ...], validation: tuple[str, ...], sides: tuple[list[str], list[str]]
) -> None:
    split = split_dataset(tiles, training_scenes=training, validation_scenes=validation)
    assert (names(split.training), names(split.validation)) == sides
    assert split.notes == ()
    for side, scenes in (("training", training), ("validation", validation)):
        assert (f"{side} by scene {', '.join(sorted(scenes))}" in split.rule) == bool(scenes)


def test_a_split_by_lists_says_which_scenes_are_on_both_sides(tiles: Dataset, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("t1_a\nt3_a\n")
    split = split_dataset(tiles, validation_list=tmp_path / "mine.txt")
    assert names(split.training) == ["t1_b", "t2_a"]
    assert split.rule == "validation by list mine.txt"
    assert len(split.notes) == 1
    assert "share the scene t1;" in split.notes[0]
    mixed = split_dataset(tiles, training_scenes=["t2"], validation_list=tmp_path / "mine.txt")
    assert names(mixed.training) == ["t2_a"]
    assert mixed.notes == ()


def test_a_piped_list_is_told_by_what_it_holds(tiles: Dataset) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"t1_a\n")
    os.close(writing)
    rule = split_dataset(tiles, validation_list=Path(f"/dev/fd/{reading}")).rule
    os.close(reading)
    assert re.fullmatch(r"validation by a list of 1 images: t1_a \(SHA-256 of .*: [0-9a-f]{64}\)", rule), rule


def test_the_lists_of_a_dataset_are_its_split(tiles: Dataset) -> None:
    (tiles.folder / "train.txt").write_text("t1_a\nt1_b\n")
    with pytest.raises(DatasetError, match="no split into training"):
        split_dataset(tiles)  # half a split is none
    (tiles.folder / "val.txt").write_text("t2_a\n")
    split = split_dataset(tiles)
    assert (names(split.training), names(split.validation)) == (["t1_a", "t1_b"], ["t2_a"])
    assert "train.txt and val.txt" in split.rule
    named = split_dataset(tiles, validation_scenes=["t1"])
    assert names(named.validation) == ["t1_a", "t1_b"], "what is named goes first"


def test_the_parts_of_loveda_are_its_split(tmp_path: Path) -> None:
    split = split_dataset(find_dataset(loveda(tmp_path, "Train/Urban/7", "Val/Rural/9", "Val/Urban/8")))
    assert names(split.training) == ["Train/Urban/7"]
    assert names(split.validation) == ["Val/Rural/9", "Val/Urban/8"]
    assert split.rule == "folders Train and Val"
    with pytest.raises(DatasetError, match="no split into training"):
        split_dataset(find_dataset(tmp_path / "Val"))


def test_folders_called_train_and_val_are_a_split(tmp_path: Path) -> None:
    folder_pair(tmp_path / "train", "1")
    folder_pair(tmp_path / "val", "1")
    folder_pair(tmp_path / "other", "1")
    split = split_dataset(find_dataset(tmp_path))
    assert (names(split.training), names(split.validation)) == (["train/1"], ["val/1"])


def test_without_a_split_there_is_a_hint(tiles: Dataset) -> None:
    with pytest.raises(DatasetError, match="no split into training") as raised:
        split_dataset(tiles)
    for way in ("--val-scenes", "t1, t2, t3", "--val-list", "train.txt"):
        assert way in (raised.value.hint or "")


def test_an_image_on_both_sides_is_an_error(tiles: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="2 images are in training and in validation: t1_a, t1_b"):
        split_dataset(tiles, training_scenes=["t1", "t2"], validation_scenes=["t1"])
    for side in ("train.txt", "val.txt"):
        (tiles.folder / side).write_text("t2_a\n")
    with pytest.raises(DatasetError, match="1 images are in training and in validation: t2_a"):
        split_dataset(tiles)


def test_a_side_that_is_left_empty_is_an_error(tiles: Dataset) -> None:
    with pytest.raises(DatasetError, match="leaves nothing for training"):
        split_dataset(tiles, validation_scenes=tiles.scenes)
    with pytest.raises(DatasetError, match="leaves nothing for validation"):
        split_dataset(tiles, training_scenes=tiles.scenes)


def test_a_side_is_named_in_one_way(tiles: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="by scenes and by a list"):
        split_dataset(tiles, validation_scenes=["t1"], validation_list=tmp_path / "val.txt")


def test_names_are_bytes_to_the_system_but_never_a_crash(tmp_path: Path) -> None:
    odd = os.fsdecode(b"t\xff_1")
    try:
        folder_pair(tmp_path, odd)
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    assert names(find_dataset(tmp_path)) == [odd]
