"""The tiles that a student is distilled on: any mixture of sources, and what happens where one cannot be used."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import from_origin
from scene_helpers import noise, sparse_raster, write_raster

from cdkd_edge.core.errors import DatasetError, SceneError
from cdkd_edge.distillation.imagery import Imagery
from cdkd_edge.distillation.tiles import Places, SceneTiles
from cdkd_edge.raster.grid import TileGrid
from cdkd_edge.raster.stretch import Stretch
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.training.views import TilePlace, View, draw_view

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

T = 64
STRICT = SegmentOptions(strict=True)


def encoded(pixels, kind="PNG", **options):
    """A picture ``[3, H, W]`` as the bytes of a file."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, kind, **options)
    return file.getvalue()


def write_shard(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(autouse=True)
def _few_attempts(monkeypatch):
    monkeypatch.setattr("cdkd_edge.distillation.tiles._ATTEMPTS", 50)


@pytest.fixture
def pictures(tmp_path):
    """Nine PNGs of 64 px and, last, one whose pixels are cut off."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(9):
        (folder / f"{index}.png").write_bytes(encoded(noise(T, T, seed=index)))
    whole = encoded(noise(T, T, seed=9))
    (folder / "9.png").write_bytes(whole[: len(whole) // 2])
    return folder


def all_of(tiles, epoch=0, threads=1):
    """A fresh view of every place, as a run reads them."""

    def read(index):
        view = draw_view(tiles.augmentation, [0, 1, epoch, index], None)
        return tiles.read(tiles.places[index], view, (0, epoch))

    with ThreadPoolExecutor(threads) as pool:
        return np.stack([*pool.map(read, range(len(tiles)))])


# --- sources --------------------------------------------------------------------------------------


def test_any_mixture_of_sources_gives_each_place_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    write_raster(tmp_path / "a" / "scene.tif", noise(100, 200))
    (tmp_path / "a" / "note.txt").write_text("no image")
    write_shard(tmp_path / "a" / "shard.tar", {"x/2.png": encoded(noise(64, 64)), "x/1.jpg": encoded(noise(32, 65))})
    write_raster(tmp_path / "b1.tif", noise(64, 64))
    write_raster(tmp_path / "b2.tif", noise(128, 64))
    write_raster(tmp_path / "listed.tif", noise(64, 64))
    (tmp_path / "list.txt").write_text("# a list\nlisted.tif\n\na/shard.tar\n")
    tiles = SceneTiles(["a", "b*.tif", "@list.txt", "./b1.tif"], T)
    names = [tiles.imagery.shown(image) for image in range(len(tiles.imagery))]
    # Of two names of one file the first in the alphabet counts; members stay in their order.
    assert names == ["./b1.tif", "a/scene.tif", "a/shard.tar: x/2.png", "a/shard.tar: x/1.jpg", "b2.tif", "listed.tif"]
    corners = [
        *[(0, 0, 0)],
        *[(1, row, column) for row in (0, 36) for column in (0, 45, 91, 136)],
        *[(2, 0, 0), (3, -16, 0), (3, -16, 1), (4, 0, 0), (4, 64, 0), (5, 0, 0)],
    ]
    assert list(tiles.places) == [TilePlace(*corner) for corner in corners]


@pytest.mark.parametrize("size", [(1, 1), (63, 64), (64, 65), (130, 300), (177, 13)])
def test_places_are_those_of_the_grid(size):
    for tile in (3, 7, 64):
        grid = [(row.start, column.start) for row, column in TileGrid.over(*size, tile, 0)]
        places = Places(np.array([5, size[0]], np.int32), np.array([5, size[1]], np.int32), tile)
        found = list(places)[-len(grid) :]
        assert [(place.row, place.column) for place in found] == grid
        assert {place.image for place in found} == {1}
        assert len(places) == len(grid) + len(TileGrid.over(5, 5, tile, 0))
        with pytest.raises(IndexError, match=f"place {len(places)} of"):
            places[len(places)]


def test_ten_million_places_take_no_memory(tmp_path):
    sparse_raster(tmp_path / "a.tif", 205_000, 202_000)
    tiles = SceneTiles([str(tmp_path)], T)
    assert len(tiles) == 3204 * 3157  # more than 10 million
    assert tiles.places[len(tiles) - 1] == TilePlace(0, 205_000 - T, 202_000 - T)
    assert sum(array.nbytes for array in vars(tiles.places).values() if isinstance(array, np.ndarray)) < 100


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_a_member_of_a_shard_is_read_as_the_file_outside(tmp_path, suffix):
    """With its EXIF orientation, which GDAL tells only of JPEGs."""
    exif = Image.Exif()
    exif[274] = 6
    content = encoded(noise(70, 100), {"png": "PNG", "jpg": "JPEG", "tif": "TIFF"}[suffix], exif=exif)
    (tmp_path / f"0.{suffix}").write_bytes(content)
    write_shard(tmp_path / "s,1.tar", {"first.png": encoded(noise(9, 9)), f"0.{suffix}": content})
    alone, shard = (SceneTiles([str(tmp_path / name)], T) for name in (f"0.{suffix}", "s,1.tar"))
    assert (alone.imagery.heights[0], alone.imagery.widths[0]) == (100, 70)
    assert [dataclasses.replace(place, image=0) for place in list(shard.places)[1:]] == list(alone.places)
    for place in alone.places:
        view = View(scale=0.8, quarters=1)
        assert np.array_equal(alone.read(place, view), shard.read(dataclasses.replace(place, image=1), view))


def test_other_members_of_a_shard_are_no_images(tmp_path):
    picture = encoded(noise(T, T))
    samples = {"1.png": picture, "1.seg.png": picture, "1.json": b"{}", "._1.png": b"Finder", "v1.5.png": picture}
    path = write_shard(tmp_path / "a.tar", {**samples, "d/1.seg.png": picture, "2.txt": b"2"})
    assert Imagery([str(path)], T).names == ["1.png", "v1.5.png", "d/1.seg.png"]


def test_long_names_of_members(tmp_path):
    """They have headers of their own before the member's."""
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        name = f"{'folder/' * 40}ö.png"
        path = write_shard(tmp_path / "a.tar", {name: encoded(noise(T, T))}, format=kind)
        tiles = SceneTiles([str(path)], T)
        assert tiles.imagery.names == [name]
        assert np.array_equal(tiles.read(tiles.places[0], View()), noise(T, T))


def test_values_of_16_bits_and_pixels_without_data(tmp_path):
    pixels = noise(T, 2 * T).astype(np.uint16) * 16 + 1
    pixels[:, :, :40] = 0
    write_raster(tmp_path / "a.tif", pixels, nodata=0)
    with pytest.raises(SceneError, match="uint16") as caught:
        SceneTiles([str(tmp_path)], T)
    assert "--stretch" in caught.value.hint
    for stretch in (Stretch(1, 4081, percentiles=False), Stretch(0, 100, percentiles=True)):
        options = SegmentOptions(stretch=stretch)
        tiles = SceneTiles([str(tmp_path)], T, options=options)
        left, right = tiles.places
        assert np.array_equal(tiles.read(right, View()), noise(T, 2 * T)[:, :, T:])
        assert tiles.replaced["without_data"] == 0
        assert np.array_equal(tiles.read(left, View(), among=[1]), noise(T, 2 * T)[:, :, T:])  # 40 of 64 columns
        assert tiles.replaced["without_data"] == 1


def test_percentiles_are_those_of_the_image_and_not_of_the_tile(tmp_path):
    pixels = np.concatenate([noise(T, T), noise(T, T) // 4], axis=2).astype(np.uint16)
    write_raster(tmp_path / "a.tif", pixels)
    options = SegmentOptions(stretch=Stretch(0, 100, percentiles=True))
    tiles = SceneTiles([str(tmp_path)], T, options=options)
    assert np.array_equal(tiles.read(tiles.places[1], View()), pixels[:, :, T:])


def test_a_scene_without_any_data_is_no_damaged_one(tmp_path, pictures):
    write_raster(tmp_path / "void.tif", np.zeros((3, T, T), np.uint16), nodata=0)
    options = SegmentOptions(stretch=Stretch(2, 98, percentiles=True), strict=True)
    tiles = SceneTiles([str(tmp_path / "void.tif"), str(pictures / "1.png")], T, options=options)
    void = next(place for place in tiles.places if tiles.imagery.names[place.image].endswith("void.tif"))
    assert tiles.read(void, View()).any()
    assert (tiles.skipped["views_without_data"] > 0, tiles.skipped["images_damaged"]) == (True, 0)


# --- what cannot be used --------------------------------------------------------------------------


def test_an_image_that_cannot_be_opened_is_named_left_out_and_counted(pictures):
    (pictures / "5.png").write_bytes(b"no picture")
    told = []
    tiles = SceneTiles([str(pictures)], T, progress=lambda *numbers: told.append(numbers))
    assert len(tiles) == 9
    assert [name[-5:] for name in tiles.imagery.names] == [f"{index}.png" for index in (0, 1, 2, 3, 4, 6, 7, 8, 9)]
    assert tiles.skipped["images_unreadable"] == 1
    assert any(note.startswith("1 of 10 images cannot be read and are left out: ") for note in tiles.notes)
    assert any("5.png" in note for note in tiles.notes)
    assert tiles.imagery.report()[0].left_out == 1
    assert told[-1] == (10, 10)
    assert np.array_equal(tiles.read(tiles.places[5], View()), noise(T, T, seed=6))
    with pytest.raises(SceneError, match=r"5\.png"):
        SceneTiles([str(pictures)], T, options=STRICT)


@pytest.mark.parametrize("in_shard", [False, True])
def test_a_damaged_image_is_named_once_passed_over_and_counted(pictures, tmp_path, in_shard):
    source, name = pictures, f"{pictures}/9.png"
    if in_shard:
        source = tmp_path / "a.tar"
        write_shard(source, {path.name: path.read_bytes() for path in sorted(pictures.iterdir())})
        name = f"{source}: 9.png"
    said = []
    tiles = SceneTiles([str(source)], T, note=said.append)
    assert len(tiles) == 10
    assert (said, tiles.skipped["images_damaged"]) == ([], 0)
    for epoch in range(2):
        found = all_of(tiles, epoch)
        assert all(any(np.array_equal(one, noise(T, T, seed=seed)) for seed in range(9)) for one in upright(found))
    assert len(said) == 1
    assert said[0].startswith("passed over: ")
    assert name in said[0]
    assert "vsisubfile" not in said[0]
    assert tiles.skipped["images_damaged"] == 1
    assert tiles.skipped["views_damaged"] >= 2
    assert any("1 images are damaged and were passed over" in note and name in note for note in tiles.notes)
    strict = SceneTiles([str(source)], T, options=STRICT)
    with pytest.raises(SceneError, match=r"9\.png"):
        strict.read(strict.places[9], View())


def upright(views):
    """Views of whole pictures, turned back: the turn after which the first pixels are those of a picture."""
    known = [noise(T, T, seed=seed) for seed in range(9)]
    for view in views:
        turns = [np.rot90(view[..., ::step], turn, (1, 2)) for step in (1, -1) for turn in range(4)]
        yield next((turn for turn in turns if any(np.array_equal(turn, one) for one in known)), view)


def test_a_jpeg_that_gdal_only_warns_of_is_damaged_too(tmp_path):
    content = encoded(noise(T, T), "JPEG", quality=95)
    (tmp_path / "0.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "1.jpg").write_bytes(content)
    tiles = SceneTiles([str(tmp_path)], T)
    assert np.array_equal(tiles.read(tiles.places[0], View()), tiles.read(tiles.places[1], View()))
    assert "0.jpg" in tiles.damaged[0]


def test_blank_tiles_never_come_and_others_come_in_their_stead(tmp_path):
    image = noise(4 * T, 4 * T)
    image[:, : 2 * T] = 7  # eight of sixteen
    image[:, 2 * T : 3 * T, :T] = 255
    write_raster(tmp_path / "a.tif", image)
    tiles = SceneTiles([str(tmp_path)], T)
    found = all_of(tiles)
    assert (found.std(axis=(1, 2, 3)) > 5).all()
    assert tiles.skipped["views_blank"] >= 9
    assert tiles.skipped["images_damaged"] == 0
    # Not every one in the same tile's stead.
    again = all_of(tiles, epoch=1)
    assert len({one.tobytes() for one in found[:8]}) > 3
    assert not np.array_equal(found[:8], again[:8])


def test_replacements_do_not_depend_on_what_was_read_before(pictures, tmp_path):
    image = noise(2 * T, 4 * T)
    image[:, :, : 2 * T] = 0
    write_raster(tmp_path / "blank.tif", image)
    names = [str(pictures), str(tmp_path / "blank.tif")]
    expected = [all_of(SceneTiles(names, T), epoch) for epoch in range(2)]
    threaded = SceneTiles(names, T)
    assert np.array_equal(all_of(threaded, 0, threads=4), expected[0])
    assert np.array_equal(all_of(threaded, 1, threads=3), expected[1])
    resumed = SceneTiles(names, T)  # knows nothing of the first epoch
    assert np.array_equal(all_of(resumed, 1), expected[1])


def test_only_the_places_named_take_the_place_of_others(pictures):
    tiles = SceneTiles([str(pictures)], T)
    for seed in range(5):
        assert np.array_equal(tiles.read(tiles.places[9], View(), (seed,), among=np.array([4])), noise(T, T, seed=4))


def test_if_nothing_can_be_used_it_ends(tmp_path, pictures):
    write_raster(tmp_path / "a.tif", np.full((3, T, 2 * T), 9, np.uint8))
    tiles = SceneTiles([str(tmp_path / "a.tif")], T)
    with pytest.raises(SceneError, match="of 50 tiles none can be used: 50 blank"):
        tiles.read(tiles.places[0], View())
    tiles = SceneTiles([str(pictures / "9.png")], T)
    with pytest.raises(SceneError, match=r"50 damaged; .*9\.png"):
        tiles.read(tiles.places[0], View())


def test_an_image_that_became_another_ends_the_run(pictures):
    tiles = SceneTiles([str(pictures)], T)
    (pictures / "3.png").write_bytes(encoded(noise(T, T + 1)))
    with pytest.raises(SceneError, match=r"3\.png was replaced by another"):
        tiles.read(tiles.places[3], View())


def test_small_images_are_mirrored_and_the_note_says_so(tmp_path):
    write_raster(tmp_path / "a.tif", noise(T, 40))
    tiles = SceneTiles([str(tmp_path)], T)
    (place,) = tiles.places
    view = tiles.read(place, View())
    assert np.array_equal(view[:, :, 12:52], noise(T, 40))
    assert np.array_equal(view[:, :, :12], noise(T, 40)[:, :, 12:0:-1])
    assert "1 of 1 images are smaller than 64 px: they are mirrored at their borders" in tiles.notes


# --- evaluation sets ------------------------------------------------------------------------------


@pytest.mark.parametrize("in_shard", [False, True])
def test_evaluation_sets_stay_out_by_name_and_by_content(pictures, tmp_path, in_shard):
    held_out = tmp_path / "val"
    held_out.mkdir()
    (held_out / "renamed.png").write_bytes((pictures / "2.png").read_bytes())
    (held_out / "3.tif").write_bytes(b"another file of that name")
    (tmp_path / "names.txt").write_text("[78]\n")
    source = pictures
    if in_shard:
        source = write_shard(tmp_path / "a.tar", {p.name: p.read_bytes() for p in sorted(pictures.iterdir())})
    tiles = SceneTiles([str(source)], T, exclude=[str(held_out), str(tmp_path / "names.txt")])
    kept = [name.rpartition("/")[2] for name in tiles.imagery.names]
    assert kept == [f"{index}.png" for index in (0, 1, 4, 5, 6, 9)]
    assert tiles.skipped["images_excluded"] == 4
    assert any("4 of 10 images are of an evaluation set" in note and "renamed.png" in note for note in tiles.notes)
    with pytest.raises(DatasetError, match="all 10 images are of an evaluation set"):
        SceneTiles([str(source)], T, exclude=[str(pictures)])


def test_a_part_of_a_scene_stays_out_of_every_view(tmp_path):
    image = noise(2 * T, 2 * T)
    write_raster(tmp_path / "a.tif", image)
    (tmp_path / "part.txt").write_text("a 0 0 70 10\n")
    tiles = SceneTiles([str(tmp_path / "a.tif")], T, exclude=[str(tmp_path / "part.txt")])
    for index in (0, 1):
        found = tiles.read(tiles.places[index], View())
        assert any(np.array_equal(found, image[:, T:, left : left + T]) for left in (0, T))
    assert tiles.read(tiles.places[2], View(shift=(-0.25, 0))).any()
    assert tiles.replaced["excluded"] >= 3
    with pytest.raises(SceneError, match="50 excluded"):
        tiles.read(tiles.places[2], View(scale=0.5))  # shows all of the scene


# --- the report -----------------------------------------------------------------------------------


def test_the_report_says_what_each_folder_and_shard_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("metres", "degrees", "plain"):
        (tmp_path / name).mkdir()
    utm = {"crs": "EPSG:32640", "photometric": "RGB"}
    write_raster(tmp_path / "metres/a.tif", noise(64, 130), transform=from_origin(4e5, 2.8e6, 0.5, 0.5), **utm)
    write_raster(tmp_path / "metres/b.tif", noise(64, 64, 4), transform=from_origin(4e5, 2.8e6, 2, 2), **utm)
    north = {"crs": "EPSG:4326", "transform": from_origin(10, 60, 1e-5, 1e-5)}
    write_raster(tmp_path / "degrees/a.tif", noise(64, 64), **north)
    write_raster(tmp_path / "plain/a.tif", noise(64, 64))
    (tmp_path / "plain/b.png").write_bytes(b"")
    write_shard(tmp_path / "s.tar", {"1.png": encoded(noise(32, 64)), "2.png": encoded(noise(100, 64))})
    degrees, metres, plain, shard = SceneTiles(["metres", "degrees", "plain", "s.tar"], T).imagery.report()
    assert metres.text == "2 images, 4 tiles, 64..130 x 64 px, 1 of 3 x uint8, 1 of 4 x uint8, 0.500..2.00 m"
    assert degrees.gsd[1] == pytest.approx(1.114, abs=0.002)  # along the meridian; 0.558 along the parallel
    assert plain.text == "1 images, 1 tiles, 64 x 64 px, 3 x uint8, 1 left out"
    assert (shard.name, shard.images, shard.tiles) == ("s.tar", 2, 3)
    assert json.loads(json.dumps(dataclasses.asdict(metres)))["kinds"] == {"3 x uint8": 1, "4 x uint8": 1}
    assert (shard.width, shard.height, shard.gsd) == ((64, 64), (32, 100), None)


def test_a_report_of_many_folders_stays_small(tmp_path):
    for index in range(30):
        (tmp_path / f"{index:02}").mkdir()
        write_raster(tmp_path / f"{index:02}" / "a.tif", noise(T, T + index))
    report = Imagery([f"{tmp_path}/*/a.tif"], T).report()
    assert len(report) == 20
    assert (report[-1].name, report[-1].images, report[-1].width) == ("11 more", 11, (T + 19, T + 29))
    assert sum(folder.tiles for folder in report) == 59


def test_the_digest_is_of_names_and_sizes(pictures, tmp_path):
    first = Imagery([str(pictures)], T).digest
    moved = pictures.rename(tmp_path / "moved")
    assert Imagery([str(moved)], T).digest == first
    (moved / "3.png").write_bytes(encoded(noise(T, T + 1)))
    assert Imagery([str(moved)], T).digest != first


# --- wrong inputs ---------------------------------------------------------------------------------


def test_a_folder_of_another_sensor_needs_an_option_and_one_such_image_does_not(pictures, tmp_path):
    write_raster(pictures / "deep.tif", noise(T, T).astype(np.uint16))
    tiles = SceneTiles([str(pictures)], T)
    assert any("deep.tif holds uint16 values" in note for note in tiles.notes)
    (tmp_path / "deep").mkdir()
    write_raster(tmp_path / "deep" / "0.tif", noise(T, T).astype(np.uint16))
    with pytest.raises(SceneError, match=r"no image of .*deep can be used; the first: .*0\.tif holds uint16") as caught:
        SceneTiles([str(pictures), str(tmp_path / "deep")], T)
    assert "--stretch" in caught.value.hint


def test_wrong_sources_are_named(tmp_path, pictures):
    (tmp_path / "empty").mkdir()
    shard = write_shard(tmp_path / "a.tar", {path.name: path.read_bytes() for path in sorted(pictures.iterdir())})
    whole = shard.read_bytes()
    assert whole[13312 * 5 :][:5] == b"5.png"
    files = {
        "cut.tar": whole[: 13312 * 5 - 600],
        "between.tar": whole[: 13312 * 5],
        "in-header.tar": whole[: 13312 * 5 + 100],
        "garbled.tar": whole[:512] + b"\1" * 20_000 + whole[20_512:],
        "a.tar.gz": gzip.compress(whole),
        "b.tar": gzip.compress(whole),
        "none.tar": b"",
        "text.tar": b"no tar file " * 100,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    write_shard(tmp_path / "no-image.tar", {"1.json": b"{}", "2.txt": b"2"})
    for name, message, hint in (
        ("empty", r"empty holds no raster \(\.tif, .*\.tar", "below"),
        ("gone.tar", "gone.tar does not exist", None),
        ("cut.tar", r"cut\.tar is cut off or damaged after \d members", "copy it again"),
        ("between.tar", r"between\.tar is cut off or damaged after 5 members", "head -c 1024 /dev/zero >> between.tar"),
        ("in-header.tar", r"in-header\.tar is cut off or damaged after \d members", "copy it again"),
        ("garbled.tar", r"garbled\.tar is cut off or damaged after 1 members", "copy it again"),
        ("a.tar.gz", r"a\.tar\.gz is compressed", "gunzip a.tar.gz"),
        ("b.tar", r"b\.tar is compressed", "gunzip"),
        ("none.tar", "none.tar is not a tar file", None),
        ("text.tar", "text.tar is not a tar file", None),
        ("no-image.tar", "no-image.tar holds no image", None),
        ("*.tgz", r"no raster matches .*\*\.tgz", None),
    ):
        with pytest.raises(SceneError, match=message) as caught:
            Imagery([str(tmp_path / name)], T)
        assert hint is None or hint in caught.value.hint
    assert len(Imagery([str(shard)], T)) == 10


def test_the_list_with_a_wrong_line_is_named(tmp_path, pictures):
    (tmp_path / "list.txt").write_text(f"{pictures / '1.png'}\n{pictures / '11.png'}\n")
    with pytest.raises(SceneError, match=r"the list .*list\.txt cannot be used: scene .*11\.png does not exist"):
        Imagery([f"@{tmp_path / 'list.txt'}"], T)


def test_masks_beside_their_images_are_no_images(tmp_path):
    for name in ("1_sat.jpg", "1_mask.png", "2_mask.png", "mask.png"):
        (tmp_path / name).write_bytes(encoded(noise(T, T)))
    expected = ["1_sat.jpg", "2_mask.png", "mask.png"]  # the mask of no image may be called that for another reason
    for argument in (tmp_path, tmp_path / "*"):
        assert [name.rpartition("/")[2] for name in Imagery([str(argument)], T).names] == expected


def test_compressed_shards_in_a_folder_are_not_passed_over(tmp_path, pictures):
    (pictures / "more.tgz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(SceneError, match=r"more\.tgz is compressed"):
        Imagery([str(pictures)], T)


def test_gdal_still_finds_sidecars(tmp_path):
    """A world file and a mask beside an image, though folders are not listed."""
    write_raster(tmp_path / "a.png", noise(T, T), driver="PNG")
    (tmp_path / "a.pgw").write_text("0.5\n0\n0\n-0.5\n100\n100\n")
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(tmp_path / "a.png", "r+") as dataset:
        mask = np.full((T, T), 255, np.uint8)
        mask[:, : T - 4] = 0
        dataset.write_mask(mask)
    tiles = SceneTiles([str(tmp_path / "a.png")], T)
    with pytest.raises(SceneError, match="without data"):
        tiles.read(tiles.places[0], View())
