package look

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestCat(t *testing.T) {
	t.Parallel()
	layers := storedImage(t, append(slices.Clone(three), []entry{
		link(tar.TypeSymlink, "up", "../../../etc/passwd"), link(tar.TypeSymlink, "loop", "loop"), link(tar.TypeLink, "other", "bin/su"),
	})...)
	files, err := Open(t.Context(), layers, 0)
	if err != nil {
		t.Fatal(err)
	}
	once, err := Open(t.Context(), layers, 0, "passwd", "lib/libc")
	if err != nil || len(once.kept) != 3 {
		t.Errorf("%d contents are kept: %v", len(once.kept), err)
	}
	for path, want := range map[string]string{
		"etc/passwd": "root and more", "/lib/libc": "lib", "usr/lib/libd": "lib", "up": "root and more", "other": "su", "/../bin/../bin/su": "su",
	} {
		for _, files := range []*Files{files, once} {
			var b strings.Builder
			if err := files.Cat(t.Context(), path, &b); err != nil || b.String() != want {
				t.Errorf("%s: got %q, %v", path, b.String(), err)
			}
		}
	}
	for path, is := range map[string]func(error) bool{
		"etc/shadow": errdefs.IsNotFound, "old/a": errdefs.IsNotFound, "etc": errdefs.IsInvalidArgument, "null": errdefs.IsInvalidArgument,
		"loop": errdefs.IsInvalidArgument, "etc/passwd/x": errdefs.IsInvalidArgument,
	} {
		if err := files.Cat(t.Context(), path, io.Discard); !is(err) {
			t.Errorf("%s: got %v", path, err)
		}
	}
}

// An archive of a whole image is a layer of the same files.
func TestTar(t *testing.T) {
	t.Parallel()
	layers := storedImage(t, three...)
	files, err := Open(t.Context(), layers, 0)
	if err != nil {
		t.Fatal(err)
	}
	list := func(layers []Layer) (lines []string) {
		tree, err := Read(t.Context(), layers, Options{})
		if err != nil {
			t.Fatal(err)
		}
		err = tree.List("/", true, func(e *Entry) error {
			lines = append(lines, fmt.Sprint(e.Path, e.ModeString(), e.UID, e.GID, e.Size, e.ModTime, e.Links, e.Target, e.Device, e.Xattrs))
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return lines
	}
	var b bytes.Buffer
	if err := files.Tar(t.Context(), []string{"/", "etc"}, &b); err != nil {
		t.Fatal(err)
	}
	if got, want := list([]Layer{{Source: plain(b.Bytes())}}), list(layers); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nnot\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	b.Reset()
	if err := files.Tar(t.Context(), []string{"lib/libd", "lib", "old"}, &b); err != nil {
		t.Fatal(err)
	}
	var names []string
	for r := tar.NewReader(&b); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name+">"+h.Linkname+string(content))
	}
	if got := fmt.Sprint(names); got != "[old/> lib>usr/lib usr/lib/libd>lib old/b>b]" {
		t.Errorf("got %s", got)
	}
	if err := files.Tar(t.Context(), []string{"missing"}, io.Discard); !errdefs.IsNotFound(err) {
		t.Errorf("a missing one: got %v", err)
	}
}

// plain is a layer that is not compressed.
type plain []byte

func (p plain) Walk(ctx context.Context, only []int64, f func(n int64, h *tar.Header, content io.Reader) error) error {
	return Stream(ctx, bytes.NewReader(p), "", "", only, f)
}
