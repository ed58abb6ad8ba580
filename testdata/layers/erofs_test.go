package layers

import (
	"bufio"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"distkit/compression"
	"distkit/erofs"
)

// mountErofs mounts an image at root until the test ends.
func mountErofs(t *testing.T, image, root, options string) {
	t.Helper()
	defer unmount(t, root)
	if err := unix.Mount(image, root, "erofs", unix.MS_RDONLY, options); err != nil {
		if err == unix.ENODEV || err == unix.ENOTBLK {
			skip(t, "erofs")
		}
		t.Fatalf("mount: %v", err)
	}
}

// unmount unmounts a file system when the test ends.
func unmount(t *testing.T, root string) {
	t.Cleanup(func() {
		if err := unix.Unmount(root, 0); err != nil && !t.Failed() && !t.Skipped() {
			t.Error(err)
		}
	})
}

// formats are the formats of an image, with the program that writes each.
var formats = map[string]func(b *erofs.Builder, ctx context.Context, w io.Writer) error{
	"complete": (*erofs.Builder).Write,
	"index":    (*erofs.Builder).Write,
	"ext4":     func(b *erofs.Builder, ctx context.Context, w io.Writer) error { return b.WriteExt4(ctx, w, 0) },
}

// imageOf makes an image of layers, and returns the tree that the kernel shows. e2fsck and fsck.erofs check the image,
// if the machine has them.
func imageOf(t *testing.T, layers []string, format string) []string {
	t.Helper()
	index := format == "index"
	dir := t.TempDir()
	b := erofs.NewBuilder(erofs.Options{Index: index, Scratch: dir})
	defer b.Close()
	var devices []string
	for _, l := range layers {
		f, err := os.Open(l)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := b.Add(context.Background(), f, ""); err != nil {
			t.Logf("erofs: %v", err)
			return []string{"refused"}
		}
		if index {
			if _, err := f.Seek(0, io.SeekStart); err != nil {
				t.Fatal(err)
			}
			devices = append(devices, plainOf(t, f))
		}
	}
	image := filepath.Join(dir, "image")
	out, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := formats[format](b, t.Context(), out); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	var check, options []string
	for _, d := range devices {
		check, options = append(check, "--device="+d), append(options, "device="+d)
	}
	root := t.TempDir()
	switch {
	case format == "ext4":
		if out, err := exec.Command("e2fsck", "-fn", image).CombinedOutput(); err != nil {
			t.Errorf("e2fsck: %v: %s", err, out)
		}
		defer unmount(t, root)
		if out, err := exec.Command("mount", "-t", "ext4", "-o", "ro,loop", image, root).CombinedOutput(); err != nil {
			t.Fatalf("mount: %v: %s", err, out)
		}
	case has("fsck.erofs"):
		if out, err := exec.Command("fsck.erofs", append(check, image)...).CombinedOutput(); err != nil {
			t.Errorf("fsck.erofs: %v: %s", err, out)
		}
		fallthrough
	default:
		mountErofs(t, image, root, strings.Join(options, ","))
	}
	lines := dump(t, root)
	for i := range lines { // directories without an entry, to which other programs give the time of the extraction
		lines[i] = strings.Replace(lines[i], " 0:0 @0.000000000", " 0:0 @now", 1)
	}
	return lines
}

// plainOf stores the plain archive of a layer.
func plainOf(t *testing.T, layer io.Reader) string {
	t.Helper()
	r, release, err := compression.NewReader(bufio.NewReader(layer))
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	dir, err := os.MkdirTemp("", "layer") // its name is used in mount options, which could not have the name of a test
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	f, err := os.Create(filepath.Join(dir, "layer.tar"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(f, r); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// An image of layers shows the same tree as applying the layers to a directory, however the files' data are stored.
func TestImagesShowWhatIsApplied(t *testing.T) {
	require(t)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			layers := []string{write(t, c.layer)}
			if c.below != nil {
				layers = []string{write(t, c.below), layers[0]}
			}
			ours := result(t, "distkit", layers)
			for format := range formats {
				if d := difference(imageOf(t, layers, format), ours); d != "" {
					t.Errorf("%s: the image differs:%s", format, d)
				}
			}
		})
	}
}

func TestImagesOfDebian(t *testing.T) {
	if *sets == "" {
		t.Log("no -sets")
		return
	}
	require(t)
	dir := t.TempDir()
	names := strings.Split(*sets, ",")
	c := exec.Command("bash", append([]string{"debian.sh", dir}, names...)...)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("debian.sh: %v: %s", err, out)
	}
	var layers []string
	for _, set := range names {
		layers = append(layers, filepath.Join(dir, set+".tar.gz"))
	}
	ours := result(t, "distkit", layers)
	for format := range formats {
		if d := difference(imageOf(t, layers, format), ours); d != "" {
			t.Errorf("%s: the image differs:%s", format, d)
		}
	}
}
