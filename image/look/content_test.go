package look

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"
	"weak"

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

// headers is a layer of directories, which notes the headers that it gives.
type headers []weak.Pointer[tar.Header]

func (s headers) Walk(_ context.Context, _ []int64, f func(n int64, h *tar.Header, content io.Reader) error) error {
	for i := range s {
		h := &tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("d%d/", i), Mode: 0o700, PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b"}}
		s[i] = weak.Make(h)
		if err := f(int64(i), h, strings.NewReader("")); err != nil {
			return err
		}
	}
	return nil
}

// A directory's header can have 1 MiB that is of no use, such as the target of a link. It is not kept.
func TestHeadersAreNotKept(t *testing.T) {
	t.Parallel()
	s := make(headers, 20)
	files, err := Open(t.Context(), []Layer{{Source: s}}, 0)
	if err != nil {
		t.Fatal(err)
	}
	runtime.GC()
	for i, p := range s {
		if p.Value() != nil {
			t.Fatalf("header %d is kept", i)
		}
	}
	var b bytes.Buffer
	if err := files.Tar(t.Context(), []string{"d7"}, &b); err != nil {
		t.Fatal(err)
	}
	if h, err := tar.NewReader(&b).Next(); err != nil || h.Name != "d7/" || h.Mode != 0o700 || h.PAXRecords["SCHILY.xattr.user.a"] != "b" {
		t.Errorf("%+v: %v", h, err)
	}
	if _, err := Open(t.Context(), []Layer{{Source: make(headers, 2000)}}, 600<<10); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("directories of more than the memory: %v", err)
	}
}
