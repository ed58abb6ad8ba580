package look

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"distkit/content"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// An entry is an entry of a layer, with its content.
type entry struct {
	tar.Header
	body string
}

func reg(name, body string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, ModTime: time.Unix(1, 5)}, body}
}

func dir(name string) entry {
	return entry{tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755}, ""}
}

func link(kind byte, name, target string) entry {
	return entry{tar.Header{Typeflag: kind, Name: name, Linkname: target}, ""}
}

// archived returns a layer with the entries.
func archived(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		e.Size = int64(len(e.body))
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func put(t *testing.T, s *content.Store, b []byte) v1.Descriptor {
	t.Helper()
	dgst := digest.FromBytes(b)
	if _, err := content.WriteBlob(t.Context(), s, string(dgst), bytes.NewReader(b), int64(len(b)), dgst); err != nil && !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	return v1.Descriptor{Digest: dgst, Size: int64(len(b))}
}

// storedImage stores an image with the layers, and returns them.
func storedImage(t *testing.T, layers ...[]entry) []Layer {
	t.Helper()
	s, err := content.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	config, manifest := v1.Image{RootFS: v1.RootFS{Type: "layers"}}, v1.Manifest{MediaType: v1.MediaTypeImageManifest}
	for _, entries := range layers {
		plain := archived(t, entries...)
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		if _, err := z.Write(plain); err != nil {
			t.Fatal(err)
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		d := put(t, s, b.Bytes())
		d.MediaType = v1.MediaTypeImageLayerGzip
		manifest.Layers = append(manifest.Layers, d)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(plain))
	}
	document := func(v any) v1.Descriptor {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return put(t, s, b)
	}
	manifest.Config = document(config)
	manifest.Config.MediaType = v1.MediaTypeImageConfig
	d := document(manifest)
	d.MediaType = v1.MediaTypeImageManifest
	list, err := Layers(t.Context(), image.Walker{Store: s}, image.Image{Target: d})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

var three = [][]entry{
	{dir("etc"), reg("etc/passwd", "root"), reg("etc/shadow", "secret"), dir("usr/lib"), link(tar.TypeSymlink, "lib", "usr/lib"), reg("lib/libc", "lib"),
		link(tar.TypeLink, "usr/lib/libd", "lib/libc"), dir("old"), reg("old/a", ""), {tar.Header{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3, Mode: 0o666}, ""}},
	{reg("etc/.wh.shadow", ""), reg("etc/passwd", "root and more"), dir("old"), reg("old/.wh..wh..opq", ""), reg("old/b", "b")},
	{{tar.Header{Typeflag: tar.TypeReg, Name: "bin/su", Mode: 0o4711, Uid: 1, Gid: 2,
		PAXRecords: map[string]string{"SCHILY.xattr.user.x": "\xff"}}, "su"}, reg("new\nline", "")},
}

func TestList(t *testing.T) {
	t.Parallel()
	tree, err := Read(t.Context(), storedImage(t, three...), Options{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	list := func(path string, recursive bool) error {
		got = nil
		return tree.List(path, recursive, func(e *Entry) error {
			got = append(got, fmt.Sprintf("%q %s %d:%d %d %d %d>%s", e.Path, e.ModeString(), e.UID, e.GID, e.Size, e.Links, e.Layer, e.Target))
			return nil
		})
	}
	if err := list("/", true); err != nil {
		t.Fatal(err)
	}
	want := []string{
		`"/" drwxr-xr-x 0:0 0 1 0>`,
		`"/bin" drwxr-xr-x 0:0 0 1 3>`, // no layer has an entry for it
		`"/bin/su" -rws--x--x 1:2 2 1 3>`,
		`"/etc" drwxr-xr-x 0:0 0 1 1>`,
		`"/etc/passwd" -rw-r--r-- 0:0 13 1 2>`,
		`"/lib" lrwxrwxrwx 0:0 7 1 1>usr/lib`,
		`"/new\nline" -rw-r--r-- 0:0 0 1 3>`,
		`"/null" crw-rw-rw- 0:0 0 1 1>`,
		`"/old" drwxr-xr-x 0:0 0 1 2>`,
		`"/old/b" -rw-r--r-- 0:0 1 1 2>`,
		`"/usr" drwxr-xr-x 0:0 0 1 1>`,
		`"/usr/lib" drwxr-xr-x 0:0 0 1 1>`,
		`"/usr/lib/libc" -rw-r--r-- 0:0 3 2 1>`,
		`"/usr/lib/libd" -rw-r--r-- 0:0 3 2 1>`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nnot\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for path, want := range map[string]int{"": 7, "lib": 1, "/lib/": 2, "../etc/passwd": 1, "lib/../lib": 2} {
		if err := list(path, false); err != nil || len(got) != want {
			t.Errorf("%q: %q, %v", path, got, err)
		}
	}
	for path, is := range map[string]func(error) bool{"etc/shadow": errdefs.IsNotFound, "etc/passwd/x": errdefs.IsInvalidArgument} {
		if err := list(path, false); !is(err) {
			t.Errorf("%q: got %v", path, err)
		}
	}
}

func TestJSON(t *testing.T) {
	t.Parallel()
	tree, err := Read(t.Context(), storedImage(t, three...), Options{})
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"bin/su": `{"path":"/bin/su","type":"file","mode":"4711","uid":1,"gid":2,"size":2,"mtime":"1970-01-01T00:00:00Z","links":1,"xattrs":{"user.x":"/w=="},"layer":3}`,
		"null":   `{"path":"/null","type":"char","mode":"0666","uid":0,"gid":0,"size":0,"mtime":"1970-01-01T00:00:00Z","links":1,"device":"1:3","layer":1}`,
	} {
		err := tree.List(path, false, func(e *Entry) error {
			if got, err := json.Marshal(e); err != nil || string(got) != want {
				t.Errorf("got %s, %v", got, err)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	for _, seconds := range []int64{253402300800, -62167219201} { // 10000-01-01, and a second before the year 0
		got, err := json.Marshal(&Entry{Path: "/f", Type: File, ModTime: time.Unix(seconds, 0).UTC()})
		if want := `{"path":"/f","type":"file","mode":"0000","uid":0,"gid":0,"size":0}`; err != nil || string(got) != want {
			t.Errorf("%d seconds: got %s, %v", seconds, got, err)
		}
	}
	got, err := json.Marshal(&Entry{Path: "/\xff", Type: Whiteout, Change: "D"})
	if want := `{"change":"D","path":"/\ufffd","pathBytes":"L/8=","type":"whiteout","uid":0,"gid":0,"size":0}`; err != nil || string(got) != want {
		t.Errorf("got %s, %v", got, err)
	}
}

func TestChanges(t *testing.T) {
	t.Parallel()
	var got []string
	_, err := Read(t.Context(), storedImage(t, three...), Options{Change: func(e *Entry) error {
		if e.Layer > 1 {
			got = append(got, fmt.Sprintf("%d %s %s", e.Layer, e.Change, e.Path))
		}
		return nil
	}})
	want := []string{"2 C /etc/passwd", "2 C /old", "2 A /old/b", "2 D /etc/shadow", "2 D /old/a", "3 A /bin/su", "3 A /new\nline"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestEntriesOfALayer(t *testing.T) {
	t.Parallel()
	layers := storedImage(t, three...)
	for name, want := range map[string]int{"1": 0, "-1": 2, string(layers[1].Digest): 1, string(layers[1].DiffID): 1} {
		if got, err := Choose(layers, name); err != nil || got != want {
			t.Errorf("%s: got %d, %v", name, got, err)
		}
	}
	for name, is := range map[string]func(error) bool{
		"0": errdefs.IsNotFound, "4": errdefs.IsNotFound, "-4": errdefs.IsNotFound, string(digest.FromString("")): errdefs.IsNotFound, "x": errdefs.IsInvalidArgument,
	} {
		if _, err := Choose(layers, name); !is(err) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	var got []string
	walk := func(l Layer, only []int64) error {
		got = nil
		return l.Walk(t.Context(), only, func(n int64, h *tar.Header, content io.Reader) error {
			e, err := EntryOf(h)
			b, rerr := io.ReadAll(content)
			got = append(got, fmt.Sprintf("%d %s %s %s", n, e.ModeString(), e.Path, b))
			return cmp.Or(err, rerr)
		})
	}
	if err := walk(layers[1], nil); err != nil || fmt.Sprintf("%q", got) != `["0 w--------- /etc/shadow " "1 -rw-r--r-- /etc/passwd root and more" "2 drwxr-xr-x /old " "3 o--------- /old " "4 -rw-r--r-- /old/b b"]` {
		t.Errorf("got %q, %v", got, err)
	}
	if err := walk(layers[1], []int64{1, 4}); err != nil || fmt.Sprintf("%q", got) != `["1 -rw-r--r-- /etc/passwd root and more" "4 -rw-r--r-- /old/b b"]` {
		t.Errorf("got %q, %v", got, err)
	}
}

// A layer that is corrupt, or is not the expected one, is an error, however it is verified.
func TestCorruptLayers(t *testing.T) {
	t.Parallel()
	for _, lone := range []bool{false, true} {
		layers := storedImage(t, three...)
		l := layers[1]
		s := l.Source.(stored)
		if lone {
			s.layer.DiffID = ""
		}
		walk := func() error {
			return s.Walk(t.Context(), nil, func(int64, *tar.Header, io.Reader) error { return nil })
		}
		if err := walk(); err != nil {
			t.Errorf("the good one: %v", err)
		}
		path, err := s.store.Path(l.Digest)
		if err != nil {
			t.Fatal(err)
		}
		other, err := s.store.Path(layers[2].Digest)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(other, path); err != nil {
			t.Fatal(err)
		}
		if err := walk(); !errdefs.IsDataLoss(err) {
			t.Errorf("another layer: got %v", err)
		}
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	if _, err := Read(t.Context(), storedImage(t, three...), Options{MaxMemory: 200}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("memory: got %v", err)
	}
	for _, e := range []entry{reg("f/g", ""), {tar.Header{Typeflag: tar.TypeReg, Name: "x", Uid: 1<<32 - 1}, ""}, link(tar.TypeLink, "l", "missing")} {
		if _, err := Read(t.Context(), storedImage(t, []entry{reg("f", ""), e}), Options{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: got %v", e.Name, err)
		}
	}
}
