package look

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"path"
	"runtime"
	"slices"
	"strings"
	"testing"
	"weak"

	"distkit/layer"

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

// An archive of a whole image is a layer with the same files.
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

// headers is a layer of directories, which records the headers that it has returned.
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

// A directory's header can have 1 MiB of data that nothing uses, such as the target of a link. That data is not kept.
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

// counted is a layer that counts how often it is walked. After the first walk it claims to have a list.
type counted struct {
	entries []entry
	walked  *int
}

func (c counted) Listed() bool { return *c.walked > 0 }

func (c counted) Walk(_ context.Context, only []int64, f func(n int64, h *tar.Header, content io.Reader) error) error {
	*c.walked++
	for i, e := range c.entries {
		if only != nil && !slices.Contains(only, int64(i)) {
			continue
		}
		h := e.Header
		h.Size = int64(len(e.body))
		if err := f(int64(i), &h, strings.NewReader(e.body)); err != nil {
			return err
		}
	}
	return nil
}

// If layers decide where a path leads, those below are not read.
func TestTopmostLayersAreEnough(t *testing.T) {
	t.Parallel()
	base := []entry{dir("etc"), reg("etc/base", "base"), link(tar.TypeSymlink, "x", "etc"), reg("only", "base")}
	for _, c := range []struct {
		name, path, want string
		top              []entry
		reads            [3]int // of each layer, the lowest first
	}{
		{"the topmost layer has it", "etc/a", "a", []entry{dir("etc"), reg("etc/a", "a")}, [3]int{0, 0, 1}},
		{"by a symbolic link", "l/a", "a", []entry{dir("etc"), reg("etc/a", "a"), link(tar.TypeSymlink, "l", "/etc")}, [3]int{0, 0, 1}},
		{"by a hard link", "b", "a", []entry{reg("a", "a"), link(tar.TypeLink, "b", "a")}, [3]int{0, 0, 1}},
		{"it is only in the lowest", "only", "base", []entry{dir("etc"), reg("etc/a", "a")}, [3]int{1, 2, 3}},
		{"the directory is implied", "etc/a", "a", []entry{reg("etc/a", "a")}, [3]int{1, 2, 3}},
		{"another entry replaces it by a symbolic link below", "etc/a", "b", []entry{dir("etc"), reg("etc/a", "a"), reg("x/a", "b")}, [3]int{1, 2, 3}},
		{"a hard link to a file below", "b", "base", []entry{link(tar.TypeLink, "b", "only")}, [3]int{1, 2, 3}},
	} {
		var layers []Layer
		var reads [3]int
		for i, entries := range [][]entry{base, {dir("opt"), reg("opt/middle", "middle")}, c.top} {
			layers = append(layers, Layer{Source: counted{entries, &reads[i]}})
		}
		s, err := Open(t.Context(), layers, 0, c.path)
		if err != nil {
			t.Fatal(err)
		}
		if reads != c.reads {
			t.Errorf("%s: the layers are read %v times, not %v", c.name, reads, c.reads)
		}
		var b bytes.Buffer
		if err := s.Cat(t.Context(), c.path, &b); err != nil || b.String() != c.want {
			t.Errorf("%s: %q, %v", c.name, b.String(), err)
		}
	}
}

// Whatever is in the layers, a path leads to the same content as if all layers were read.
func TestTopmostLayersAgree(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(5, 6))
	names := []string{"a", "b", "c", "a/a", "a/b", "b/a", "b/b", "a/a/a", "a/a/b", "b/a/a", "c/a"}
	pick := func() string { return names[r.IntN(len(names))] }
	decided := 0
	for round := range 4000 {
		var layers []Layer
		for l := range 3 {
			entries := []entry{dir("a"), dir("b")}[:r.IntN(3)]
			for k := range 1 + r.IntN(6) {
				switch name := pick(); r.IntN(8) {
				case 0, 1, 2:
					entries = append(entries, dir(name))
				case 3, 4:
					entries = append(entries, reg(name, fmt.Sprint(l, k)))
				case 5:
					entries = append(entries, link(tar.TypeSymlink, name, "/"+pick()))
				case 6:
					entries = append(entries, link(tar.TypeLink, name, pick()))
				case 7:
					d, base := path.Split(name)
					entries = append(entries, reg(d+layer.WhiteoutPrefix+base, ""))
				}
			}
			layers = append(layers, Layer{Source: counted{entries, new(int)}})
		}
		whole, err := open(t.Context(), layers, 0)
		if err != nil {
			continue // the layers are not an image
		}
		for _, p := range names {
			few, err := Open(t.Context(), layers, 0, p)
			if err != nil {
				t.Fatalf("round %d, %s: %v", round, p, err)
			}
			if len(few.layers) < len(layers) {
				decided++
			}
			var want, got bytes.Buffer
			wantErr, gotErr := whole.Cat(t.Context(), p, &want), few.Cat(t.Context(), p, &got)
			if fmt.Sprint(wantErr) != fmt.Sprint(gotErr) || want.String() != got.String() {
				t.Fatalf("round %d, %s: got %q, %v, not %q, %v", round, p, got.String(), gotErr, want.String(), wantErr)
			}
			for _, l := range layers {
				*l.Source.(counted).walked = 0
			}
		}
	}
	if decided < 200 {
		t.Errorf("few layers were enough %d times", decided)
	}
}
