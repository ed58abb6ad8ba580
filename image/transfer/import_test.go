package transfer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"distkit/image"
	"distkit/image/transfer"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func only(t testing.TB, platform string) *image.Platform {
	t.Helper()
	p, err := image.ParsePlatform(platform)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// stream hides all methods of a reader except Read, and returns a few bytes at a time.
type stream struct{ r io.Reader }

func (s stream) Read(p []byte) (int, error) { return s.r.Read(p[:min(len(p), 1000)]) }

func (w *world) load(archive []byte, o transfer.ImportOptions) ([]string, error) {
	w.t.Helper()
	images, err := transfer.Import(w.t.Context(), w.store, w.names, transfer.Stream(stream{bytes.NewReader(archive)}), o)
	w.clean()
	var all []string
	for _, img := range images {
		all = append(all, img.Name+" "+string(img.Target.Digest))
	}
	return all, err
}

func (w *world) mustLoad(archive []byte, o transfer.ImportOptions) []string {
	w.t.Helper()
	got, err := w.load(archive, o)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, record := range got {
		if !slices.Contains(w.list(), record) {
			w.t.Errorf("%q was reported, not named: %q", record, w.list())
		}
	}
	return got
}

func equal(t testing.TB, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("got\n %s\nwant\n %s", strings.Join(got, "\n "), strings.Join(want, "\n "))
	}
}

func TestImportNamesOfALayout(t *testing.T) {
	from := newWorld(t)
	m := from.image("amd64", "one", "two")
	bare := m
	bare.Platform = nil
	ref, full := v1.AnnotationRefName, transfer.AnnotationImageName
	at := " " + string(m.Digest)
	for name, c := range map[string]struct {
		entries []v1.Descriptor
		o       transfer.ImportOptions
		want    []string
		errs    string
	}{
		"containerd's name wins":  {[]v1.Descriptor{annotated(bare, full, "docker.io/library/x:1", ref, "1")}, transfer.ImportOptions{}, []string{"docker.io/library/x:1" + at}, ""},
		"full ref name untouched": {[]v1.Descriptor{annotated(bare, ref, "x:1")}, transfer.ImportOptions{BaseName: "b"}, []string{"x:1" + at}, ""},
		"tag with base":           {[]v1.Descriptor{annotated(bare, ref, "1")}, transfer.ImportOptions{BaseName: "example.org/b"}, []string{"example.org/b:1" + at}, ""},
		"tag without base":        {[]v1.Descriptor{annotated(bare, ref, "1")}, transfer.ImportOptions{}, nil, `only the tag "1"`},
		"nameless":                {[]v1.Descriptor{bare}, transfer.ImportOptions{}, nil, "has no name"},
		"nameless with name":      {[]v1.Descriptor{bare}, transfer.ImportOptions{Name: "n:1"}, []string{"n:1" + at}, ""},
		"nameless with base":      {[]v1.Descriptor{bare}, transfer.ImportOptions{BaseName: "b"}, []string{"b@" + string(m.Digest) + at}, ""},
		"two names":               {[]v1.Descriptor{annotated(bare, ref, "x:2"), annotated(bare, ref, "x:1")}, transfer.ImportOptions{}, []string{"x:2" + at, "x:1" + at}, ""},
		"two names, one given":    {[]v1.Descriptor{annotated(bare, ref, "x:2"), annotated(bare, ref, "x:1")}, transfer.ImportOptions{Name: "n"}, []string{"n" + at}, ""},
		"named beside nameless":   {[]v1.Descriptor{bare, annotated(bare, ref, "x:1")}, transfer.ImportOptions{}, []string{"x:1" + at}, ""},
		"the same twice":          {[]v1.Descriptor{annotated(bare, ref, "x:1"), annotated(bare, ref, "x:1")}, transfer.ImportOptions{}, []string{"x:1" + at}, ""},
		"no image":                {nil, transfer.ImportOptions{}, nil, ""},
		"a name that is none":     {[]v1.Descriptor{annotated(bare, ref, "x:1"), annotated(bare, full, "x y")}, transfer.ImportOptions{}, nil, "name"},
	} {
		t.Run(name, func(t *testing.T) {
			to := newWorld(t)
			got, err := to.load(archiveOf(t, from.layout(c.entries...)...), c.o)
			if c.errs == "" && err != nil || c.errs != "" && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.errs)) {
				t.Fatalf("error %v, want %q", err, c.errs)
			}
			if err != nil {
				equal(t, to.list())
				return
			}
			equal(t, got, c.want...)
			slices.Sort(c.want)
			equal(t, to.list(), c.want...)
		})
	}
}

func TestImportTwoImagesCannotShareAName(t *testing.T) {
	from := newWorld(t)
	a, b := from.image("amd64", "a"), from.image("amd64", "b")
	to := newWorld(t)
	same := archiveOf(t, from.layout(annotated(a, v1.AnnotationRefName, "x:1"), annotated(b, v1.AnnotationRefName, "x:1"))...)
	if _, err := to.load(same, transfer.ImportOptions{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("one name in the archive for two: %v", err)
	}
	two := archiveOf(t, from.layout(annotated(a, v1.AnnotationRefName, "x:1"), annotated(b, v1.AnnotationRefName, "x:2"))...)
	if _, err := to.load(two, transfer.ImportOptions{Name: "x"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("one name given for two: %v", err)
	}
	equal(t, to.list())
	equal(t, to.mustLoad(two, transfer.ImportOptions{}), "x:1 "+string(a.Digest), "x:2 "+string(b.Digest))
}

// A name that exists keeps its labels, except those that describe its old content or that the archive sets.
func TestImportReplacesNamesAndKeepsLabels(t *testing.T) {
	from := newWorld(t)
	d := annotated(from.image("amd64", "new"), v1.AnnotationRefName, "x:1", "vendor", "them", image.AnnotationCreated, "lies")
	archive := archiveOf(t, from.layout(d)...)
	fresh, used := newWorld(t), newWorld(t)
	fresh.mustLoad(archive, transfer.ImportOptions{})
	used.name("x:1", annotated(used.image("amd64", "old"), "vendor", "me", "team", "core", "org.opencontainers.image.version", "1"))
	used.mustLoad(archive, transfer.ImportOptions{})
	for w, want := range map[*world]map[string]string{fresh: {"vendor": "them"}, used: {"vendor": "them", "team": "core"}} {
		img, err := w.names.Get("x:1")
		if err != nil {
			t.Fatal(err)
		}
		if img.Target.Digest != d.Digest || !maps.Equal(img.Labels, want) || time.Since(img.CreatedAt) > time.Hour {
			t.Errorf("%+v, want labels %v", img, want)
		}
	}
}

func TestImportCompressedArchive(t *testing.T) {
	from := newWorld(t)
	m := from.image("amd64", "one")
	plain := archiveOf(t, from.layout(annotated(m, v1.AnnotationRefName, "x:1"))...)
	for name, archive := range map[string][]byte{"gzip": gz(t, plain), "zstd": zst(t, plain)} {
		t.Run(name, func(t *testing.T) {
			to := newWorld(t)
			equal(t, to.mustLoad(archive, transfer.ImportOptions{}), "x:1 "+string(m.Digest))
			for _, cut := range []int{5, len(archive) / 2, len(archive) - 3} {
				to := newWorld(t)
				if _, err := to.load(archive[:cut], transfer.ImportOptions{}); !errdefs.IsDataLoss(err) {
					t.Errorf("cut at %d: %v", cut, err)
				}
				equal(t, to.list())
			}
			flipped := bytes.Clone(archive)
			flipped[len(flipped)-6] ^= 1 // the checksum
			if _, err := newWorld(t).load(flipped, transfer.ImportOptions{}); !errdefs.IsDataLoss(err) {
				t.Errorf("wrong checksum: %v", err)
			}
		})
	}
}

func TestImportTruncatedAnywhere(t *testing.T) {
	from := newWorld(t)
	m := from.image("amd64", "one")
	from.put("x", make([]byte, 2048), digest.SHA256) // zeros do not end an archive
	archive := archiveOf(t, from.layout(annotated(m, v1.AnnotationRefName, "x:1"))...)
	to := newWorld(t)
	for cut := len(archive) - 1024; cut >= 0; cut -= 256 {
		if _, err := to.load(archive[:cut], transfer.ImportOptions{}); err == nil {
			t.Fatalf("cut at %d of %d: taken", cut, len(archive))
		} else if cut > 0 && !errdefs.IsDataLoss(err) {
			t.Errorf("cut at %d of %d: %v", cut, len(archive), err)
		}
	}
	equal(t, to.list())
}

func TestImportDocker(t *testing.T) {
	l := newLegacy(t)
	l.image([]string{"redis", "example.org/redis:7"}, "base", "redis", "base")
	l.image([]string{"redis:6"}, "base")
	l.image(nil, "base", "none")
	first, last := l.all(), l.all()
	slices.Reverse(first)
	var records []string
	for _, entries := range [][]entry{last, first} { // manifest.json at the end, and at the beginning
		to := newWorld(t)
		got := to.mustLoad(archiveOf(t, entries...), transfer.ImportOptions{})
		var names []string
		for _, r := range got {
			names = append(names, strings.Fields(r)[0])
		}
		equal(t, names, "docker.io/library/redis:latest", "example.org/redis:7", "docker.io/library/redis:6")
		if records != nil {
			equal(t, got, records...)
		}
		records = got

		img, err := to.names.Get("docker.io/library/redis:latest")
		if err != nil {
			t.Fatal(err)
		}
		layers, err := image.Walker{Store: to.store}.Layers(t.Context(), img.Target)
		if err != nil {
			t.Fatal(err)
		}
		if len(layers) != 3 || layers[0].Digest != layers[2].Digest || layers[0].Digest != layers[0].DiffID || layers[0].MediaType != v1.MediaTypeImageLayer {
			t.Errorf("layers: %+v", layers)
		}
		// The first image has two layers, one of them twice, and the second has one. There are three configs and three
		// manifests.
		if n := len(to.digests()); n != 9 {
			t.Errorf("%d blobs: %v", n, to.digests())
		}
	}
}

func TestImportDockerWithCompressedLayers(t *testing.T) {
	cfg, layers := config(t, "amd64", "one", "two")
	entries := []entry{
		{name: "sha256:" + digest.FromBytes(cfg).Encoded(), body: string(cfg)},
		{name: "a.tar.gz", body: string(gz(t, layers[0]))},
		{name: "b.tar.zst", body: string(zst(t, layers[1]))},
		{name: "manifest.json", body: fmt.Sprintf(`[{"Config":"sha256:%s","RepoTags":["x:1"],"Layers":["a.tar.gz","b.tar.zst"]}]`, digest.FromBytes(cfg).Encoded())},
	}
	to := newWorld(t)
	to.mustLoad(archiveOf(t, entries...), transfer.ImportOptions{})
	img, err := to.names.Get("docker.io/library/x:1")
	if err != nil {
		t.Fatal(err)
	}
	got, err := image.Walker{Store: to.store}.Layers(t.Context(), img.Target)
	if err != nil {
		t.Fatal(err)
	}
	if got[0].MediaType != v1.MediaTypeImageLayerGzip || got[1].MediaType != v1.MediaTypeImageLayerZstd {
		t.Errorf("layers: %+v", got)
	}

	entries[1].body = string(gz(t, layers[1]))
	if _, err := newWorld(t).load(archiveOf(t, entries...), transfer.ImportOptions{}); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "diff ID") {
		t.Errorf("a layer that is another one: %v", err)
	}
}

// Since version 25 docker writes an OCI layout that also has a manifest.json.
func TestImportDockerWithLayout(t *testing.T) {
	from := newWorld(t)
	m := from.image("amd64", "one")
	entries := append(from.layout(annotated(m, transfer.AnnotationImageName, "docker.io/library/x:1", v1.AnnotationRefName, "1")),
		entry{name: "manifest.json", body: `[{"Config":"blobs/sha256/0","RepoTags":["other:1"],"Layers":[]}]`})
	equal(t, newWorld(t).mustLoad(archiveOf(t, entries...), transfer.ImportOptions{}), "docker.io/library/x:1 "+string(m.Digest))
}

func TestImportLinks(t *testing.T) {
	cfg, layers := config(t, "amd64", "one", "one")
	manifest := func(layer string) entry {
		return entry{name: "manifest.json", body: `[{"Config":"c.json","RepoTags":["x:1"],"Layers":["l.tar","` + layer + `"]}]`}
	}
	base := []entry{{name: "c.json", body: string(cfg)}, {name: "l.tar", body: string(layers[0])}}
	for name, c := range map[string]struct {
		layer string
		links []entry
		ok    bool
	}{
		"symlink":             {"d/l.tar", []entry{{name: "d/l.tar", kind: tar.TypeSymlink, link: "../l.tar"}}, true},
		"symlink to symlink":  {"d/l.tar", []entry{{name: "d/l.tar", kind: tar.TypeSymlink, link: "m"}, {name: "d/m", kind: tar.TypeSymlink, link: "../l.tar"}}, true},
		"hard link":           {"d/l.tar", []entry{{name: "d/l.tar", kind: tar.TypeLink, link: "./l.tar"}}, true},
		"dot slash":           {"./l.tar", nil, true},
		"leads outside":       {"d/l.tar", []entry{{name: "d/l.tar", kind: tar.TypeSymlink, link: "../../etc/passwd"}}, false},
		"unused and outside":  {"l.tar", []entry{{name: "d/l.tar", kind: tar.TypeSymlink, link: "../.."}}, false},
		"absolute":            {"d/l.tar", []entry{{name: "d/l.tar", kind: tar.TypeSymlink, link: "/l.tar"}}, false},
		"hard link upwards":   {"d/l.tar", []entry{{name: "d/l.tar", kind: tar.TypeLink, link: "../l.tar"}}, false},
		"to itself":           {"d", []entry{{name: "d", kind: tar.TypeSymlink, link: "d"}}, false},
		"in a circle":         {"d", []entry{{name: "d", kind: tar.TypeSymlink, link: "e"}, {name: "e", kind: tar.TypeSymlink, link: "d"}}, false},
		"to nothing":          {"d", []entry{{name: "d", kind: tar.TypeSymlink, link: "nothing"}}, false},
		"to a directory":      {"d/l.tar", []entry{{name: "d", kind: tar.TypeSymlink, link: "e"}, {name: "e/l.tar", body: string(layers[0])}}, false},
		"absolute in listing": {"/l.tar", nil, true},
		"absolute hard link":  {"d/l.tar", []entry{{name: "/d/l.tar", kind: tar.TypeLink, link: "/l.tar"}}, true},
		"to the top alone":    {"d/e/l.tar", []entry{{name: "d/e/l.tar", kind: tar.TypeSymlink, link: "../other/l.tar"}}, true},
		"upwards in listing":  {"d/../l.tar", nil, false},
		"passed over":         {"d/VERSION", []entry{{name: "d/VERSION", body: "1.0"}}, false},
		"link for index.json": {"l.tar", []entry{{name: "oci-layout", body: `{"imageLayoutVersion":"1.0.0"}`}, {name: "index.json", kind: tar.TypeSymlink, link: "c.json"}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			to := newWorld(t)
			_, err := to.load(archiveOf(t, slices.Concat(base, c.links, []entry{manifest(c.layer)})...), transfer.ImportOptions{})
			if c.ok {
				if err != nil || len(to.list()) != 1 {
					t.Errorf("%v; names %q", err, to.list())
				}
				return
			}
			if !errdefs.IsInvalidArgument(err) && !errdefs.IsDataLoss(err) {
				t.Errorf("error %v", err)
			}
			equal(t, to.list())
		})
	}
}

// A good image in an archive with one fault. Nothing gets a name, and the error has the expected class and is one line.
func TestImportHostile(t *testing.T) {
	from := newWorld(t)
	m := from.image("amd64", "one")
	named := annotated(m, v1.AnnotationRefName, "x:1")
	good := from.layout(named)
	with := func(more ...entry) []byte { return archiveOf(t, append(slices.Clone(good), more...)...) }
	change := func(f func(*v1.Descriptor)) []byte {
		d := named
		f(&d)
		return archiveOf(t, from.layout(d)...)
	}
	replace := func(name, body string) []byte {
		entries := slices.Clone(good)
		for i := range entries {
			if entries[i].name == name {
				entries[i].body = body
			}
		}
		return archiveOf(t, entries...)
	}
	without := func(name string) []byte {
		return archiveOf(t, slices.DeleteFunc(slices.Clone(good), func(e entry) bool { return strings.HasPrefix(e.name, name) })...)
	}
	blob := func(i int) string { return good[1+i].name }
	manifest := "blobs/sha256/" + m.Digest.Encoded()
	big := strings.Repeat(" ", 8<<20)
	header := func(f func([]byte)) []byte { // of the first entry
		b := with()
		f(b[:512])
		sum := 8 * int64(' ')
		for i, c := range b[:512] {
			if i < 148 || i >= 156 {
				sum += int64(c)
			}
		}
		copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
		return b
	}
	many := func(n int, name string) []byte {
		var entries []entry
		for i := range n {
			entries = append(entries, entry{name: fmt.Sprintf(name, i)})
		}
		return archiveOf(t, append(entries, good...)...)
	}
	lacking := errdefs.IsDataLoss
	bad := errdefs.IsInvalidArgument
	for name, c := range map[string]struct {
		archive []byte
		class   func(error) bool
	}{
		"empty":                     {nil, bad},
		"one byte":                  {[]byte{0}, lacking},
		"text":                      {[]byte(strings.Repeat("<html>no archive</html>\n", 100)), bad},
		"a tar of something else":   {archiveOf(t, entry{name: "etc/passwd", body: "root"}), bad},
		"an empty tar":              {archiveOf(t), bad},
		"traversal":                 {with(entry{name: "../x"}), bad},
		"traversal within":          {with(entry{name: "blobs/../../x"}), bad},
		"traversal that comes back": {with(entry{name: "a/../b"}), bad},
		"directory outside":         {with(entry{name: "../", kind: tar.TypeDir}), bad},
		"control characters":        {with(entry{name: "a\nb"}), bad},
		"not UTF-8":                 {with(entry{name: "a\xffb"}), bad},
		"long name":                 {with(entry{name: strings.Repeat("n", 2000)}), bad},
		"blob twice":                {with(good[1]), bad},
		"index twice":               {with(good[len(good)-1]), bad},
		"twice by another spelling": {with(entry{name: "./oci-layout"}), bad},
		"link and file":             {with(entry{name: "a", kind: tar.TypeSymlink, link: "b"}, entry{name: "a"}), bad},
		"character device":          {with(entry{name: "a", kind: tar.TypeChar}), bad},
		"block device":              {with(entry{name: "a", kind: tar.TypeBlock}), bad},
		"pipe":                      {with(entry{name: "a", kind: tar.TypeFifo}), bad},
		"symlink outside":           {with(entry{name: "blobs/sha256", kind: tar.TypeSymlink, link: "/var/lib"}), bad},
		"blob that is another":      {replace(blob(0), "something else"), lacking},
		"blob that is empty":        {replace(blob(0), ""), lacking},
		"blob missing":              {without(blob(0)), lacking},
		"manifest missing":          {without(manifest), lacking},
		"no blobs":                  {without("blobs/"), lacking},
		"no index":                  {without("index.json"), lacking},
		"no layout":                 {without("oci-layout"), bad},
		"layout is no JSON":         {replace("oci-layout", "x"), bad},
		"layout of another version": {replace("oci-layout", `{"imageLayoutVersion":"2.0.0"}`), errdefs.IsFailedPrecondition},
		"index is no JSON":          {replace("index.json", "<html>"), bad},
		"index of another shape":    {replace("index.json", `{"manifests":"x"}`), bad},
		"index too big":             {replace("index.json", big+"{}"), bad},
		"layout too big":            {replace("oci-layout", big+"{}"), bad},
		"manifest.json too big":     {with(entry{name: "manifest.json", body: big + "[]"}), bad},
		"manifest.json is no JSON":  {with(entry{name: "manifest.json", body: "x"}), bad},
		"digest that is a path":     {change(func(d *v1.Descriptor) { d.Digest = "sha256:../../../../etc/passwd" }), bad},
		"digest that is none":       {change(func(d *v1.Descriptor) { d.Digest = "" }), bad},
		"size that lies":            {change(func(d *v1.Descriptor) { d.Size++ }), lacking},
		"type that lies":            {change(func(d *v1.Descriptor) { d.MediaType = v1.MediaTypeImageIndex }), bad},
		"absolute and not":          {with(entry{name: "/oci-layout"}), bad},
		"a blob for an image": {change(func(d *v1.Descriptor) {
			*d = annotated(from.put("application/json", []byte("{}"), digest.SHA256), v1.AnnotationRefName, "x:1")
		}), bad},
		"entry larger than the archive": {header(func(h []byte) { copy(h[124:136], "77777777777\x00") }), bad},
		"size in base 256, huge":        {header(func(h []byte) { copy(h[124:136], "\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff") }), bad},
		"size that is negative":         {header(func(h []byte) { copy(h[124:136], "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff") }), bad},
		"size smaller than the entry":   {header(func(h []byte) { copy(h[124:136], "00000000001\x00") }), bad},
		"old sparse file":               {header(func(h []byte) { h[156] = 'S' }), nil},
		"checksum of a later header":    {func() []byte { b := with(); b[1024]++; return b }(), lacking},
		"too many entries":              {many(1<<17, "%d"), bad},
		"too many long names":           {many(20<<10, strings.Repeat("n", 900)+"%d"), bad},
	} {
		t.Run(name, func(t *testing.T) {
			to := newWorld(t)
			_, err := to.load(c.archive, transfer.ImportOptions{})
			if err == nil || c.class != nil && !c.class(err) {
				t.Errorf("error %v", err)
			} else if strings.Contains(err.Error(), "\n") || len(err.Error()) > 400 {
				t.Errorf("error is not one line: %q", err)
			}
			equal(t, to.list())
		})
	}
}

func TestImportSparseFileOfPax(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	// Package tar does not write these records; but a header of type x may contain anything.
	records := "22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.name=a.tar\n31 GNU.sparse.realsize=1048576\n"
	h := &tar.Header{Typeflag: tar.TypeReg, Name: "PaxHeaders/a", Size: int64(len(records)), Mode: 0o644}
	if err := w.WriteHeader(h); err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(w, records)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "a.tar", Size: 512, Mode: 0o644}); err != nil {
		t.Fatal(err)
	}
	_, _ = w.Write(append([]byte("1\n0\n0\n"), make([]byte, 506)...))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	archive := b.Bytes()
	sum := int64(0)
	for _, c := range archive[148:156] {
		sum -= int64(c)
	}
	archive[156] = 'x'
	for _, c := range archive[:512] {
		sum += int64(c)
	}
	copy(archive[148:156], fmt.Sprintf("%06o\x00 ", sum+8*' '))
	to := newWorld(t)
	if _, err := to.load(archive, transfer.ImportOptions{}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "sparse") {
		t.Errorf("error %v", err)
	}
}

func TestImportHostileDocker(t *testing.T) {
	cfg, layers := config(t, "amd64", "one")
	other, _ := config(t, "amd64", "other")
	for name, c := range map[string]struct {
		manifest, config string
		class            func(error) bool
	}{
		"good":                  {`[{"Config":"c.json","RepoTags":["x:1"],"Layers":["l.tar"]}]`, string(cfg), nil},
		"diff ID of another":    {`[{"Config":"c.json","RepoTags":["x:1"],"Layers":["l.tar"]}]`, string(other), errdefs.IsDataLoss},
		"too few layers":        {`[{"Config":"c.json","RepoTags":["x:1"],"Layers":[]}]`, string(cfg), errdefs.IsInvalidArgument},
		"layer missing":         {`[{"Config":"c.json","RepoTags":["x:1"],"Layers":["m.tar"]}]`, string(cfg), errdefs.IsDataLoss},
		"config missing":        {`[{"Config":"d.json","RepoTags":["x:1"],"Layers":["l.tar"]}]`, string(cfg), errdefs.IsDataLoss},
		"config is no JSON":     {`[{"Config":"c.json","RepoTags":["x:1"],"Layers":["l.tar"]}]`, "x", errdefs.IsInvalidArgument},
		"config is no config":   {`[{"Config":"c.json","RepoTags":["x:1"],"Layers":[]}]`, "{}", errdefs.IsInvalidArgument},
		"config too big":        {`[{"Config":"c.json","RepoTags":["x:1"],"Layers":["l.tar"]}]`, strings.Repeat(" ", 8<<20) + string(cfg), errdefs.IsInvalidArgument},
		"name is none":          {`[{"Config":"c.json","RepoTags":["X Y"],"Layers":["l.tar"]}]`, string(cfg), errdefs.IsInvalidArgument},
		"no name":               {`[{"Config":"c.json","RepoTags":null,"Layers":["l.tar"]}]`, string(cfg), errdefs.IsInvalidArgument},
		"one good, one missing": {`[{"Config":"c.json","RepoTags":["x:1"],"Layers":["l.tar"]},{"Config":"d.json","RepoTags":["x:2"],"Layers":["l.tar"]}]`, string(cfg), errdefs.IsDataLoss},
		"of another shape":      {`{"Config":"c.json"}`, string(cfg), errdefs.IsInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			to := newWorld(t)
			_, err := to.load(archiveOf(t, entry{name: "c.json", body: c.config}, entry{name: "l.tar", body: string(layers[0])},
				entry{name: "manifest.json", body: c.manifest}), transfer.ImportOptions{})
			if c.class == nil {
				if err != nil || len(to.list()) != 1 {
					t.Errorf("%v; names %q", err, to.list())
				}
				return
			}
			if !c.class(err) {
				t.Errorf("error %v", err)
			}
			equal(t, to.list())
		})
	}
}

func TestImportPlatforms(t *testing.T) {
	full := newWorld(t)
	amd, arm := full.image("amd64", "amd"), full.image("arm64", "arm")
	index := full.index(amd, arm)
	named := annotated(index, v1.AnnotationRefName, "x:1")
	whole := archiveOf(t, full.layout(named)...)

	sparse := newWorld(t)
	sparse.mustLoad(whole, transfer.ImportOptions{})
	children, err := image.Walker{Store: full.store}.Children(t.Context(), arm)
	if err != nil {
		t.Fatal(err)
	}
	sparse.delete(children[1].Digest)
	torn := archiveOf(t, sparse.layout(named)...) // has the manifest and config of arm64, but not its layer
	sparse.delete(children[0].Digest)
	bare := archiveOf(t, sparse.layout(named)...) // has only its manifest
	sparse.delete(arm.Digest)
	none := archiveOf(t, sparse.layout(named)...) // has nothing of it
	sparse.delete(amd.Digest)
	empty := archiveOf(t, sparse.layout(named)...) // has no platform

	for name, c := range map[string]struct {
		archive []byte
		o       transfer.ImportOptions
		want    digest.Digest
		class   func(error) bool
	}{
		"whole":               {whole, transfer.ImportOptions{}, index.Digest, nil},
		"whole, all":          {whole, transfer.ImportOptions{Select: transfer.All}, index.Digest, nil},
		"whole, one":          {whole, transfer.ImportOptions{Select: transfer.One, Platform: only(t, "linux/arm64")}, arm.Digest, nil},
		"whole, one of none":  {whole, transfer.ImportOptions{Select: transfer.One, Platform: only(t, "linux/s390x")}, "", errdefs.IsNotFound},
		"without arm64":       {none, transfer.ImportOptions{}, index.Digest, nil},
		"without arm64, all":  {none, transfer.ImportOptions{Select: transfer.All}, "", errdefs.IsDataLoss},
		"without arm64, it":   {none, transfer.ImportOptions{Select: transfer.One, Platform: only(t, "linux/arm64")}, "", func(err error) bool { return errdefs.IsNotFound(err) || errdefs.IsDataLoss(err) }},
		"without it, amd64":   {none, transfer.ImportOptions{Select: transfer.One, Platform: only(t, "linux/amd64")}, amd.Digest, nil},
		"manifest alone":      {bare, transfer.ImportOptions{}, index.Digest, nil},
		"torn":                {torn, transfer.ImportOptions{}, "", errdefs.IsDataLoss},
		"torn, the other one": {torn, transfer.ImportOptions{Select: transfer.One, Platform: only(t, "linux/amd64")}, amd.Digest, nil},
		"no platform":         {empty, transfer.ImportOptions{}, "", errdefs.IsDataLoss},
	} {
		t.Run(name, func(t *testing.T) {
			to := newWorld(t)
			got, err := to.load(c.archive, c.o)
			if c.class != nil {
				if !c.class(err) {
					t.Errorf("error %v", err)
				}
				equal(t, to.list())
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			equal(t, got, "x:1 "+string(c.want))
		})
	}
}

// Blobs that an archive leaves out may be in the store.
func TestImportUsesWhatIsThere(t *testing.T) {
	from := newWorld(t)
	m := from.image("amd64", "one")
	named := annotated(m, v1.AnnotationRefName, "x:1")
	entries := from.layout(named)
	from.mustLoad(archiveOf(t, entries[0], entries[len(entries)-1]), transfer.ImportOptions{})
	equal(t, from.list(), "x:1 "+string(m.Digest))
}

func TestImportSHA512(t *testing.T) {
	from := newWorld(t)
	cfg, layers := config(t, "amd64", "one")
	m := from.put(v1.MediaTypeImageManifest, asJSON(t, v1.Manifest{
		MediaType: v1.MediaTypeImageManifest,
		Config:    from.put(v1.MediaTypeImageConfig, cfg, digest.SHA512),
		Layers:    []v1.Descriptor{from.put(v1.MediaTypeImageLayer, layers[0], digest.SHA512)},
	}), digest.SHA512)
	img := from.name("example.org/x:1", m)
	var b bytes.Buffer
	if err := transfer.Export(t.Context(), from.store, &b, []image.Image{img}, transfer.ExportOptions{Platform: only(t, "linux/amd64")}); err != nil {
		t.Fatal(err)
	}
	to := newWorld(t)
	to.mustLoad(b.Bytes(), transfer.ImportOptions{})
	equal(t, to.list(), from.list()...)
	if !slices.Equal(to.digests(), from.digests()) {
		t.Errorf("blobs %v, want %v", to.digests(), from.digests())
	}
}

// Archives of other tools have further entries before, between and after the needed ones.
func TestImportPassesOverWhatItDoesNotKnow(t *testing.T) {
	from := newWorld(t)
	m := from.image("amd64", "one")
	good := from.layout(annotated(m, v1.AnnotationRefName, "x:1"))
	entries := slices.Concat([]entry{
		{name: "./", kind: tar.TypeDir}, {name: "pax_global_header", kind: tar.TypeXGlobalHeader},
		{name: "blobs/", kind: tar.TypeDir}, {name: "README", body: "hello"},
	}, good, []entry{
		{name: "blobs/sha256/.partial", body: "x"}, {name: "blobs/blake3/" + strings.Repeat("0", 64), body: "x"},
		{name: "usr/share/doc/x.tar", body: "x"}, {name: "blobs/", kind: tar.TypeDir},
		{name: "/", kind: tar.TypeDir}, {name: "/etc/passwd", body: "root"},
	})
	for i := range entries {
		if entries[i].kind == tar.TypeXGlobalHeader {
			entries = slices.Delete(entries, i, i+1) // package tar writes these only with records
			break
		}
	}
	to := newWorld(t)
	to.mustLoad(append(archiveOf(t, entries...), "trailing bytes"...), transfer.ImportOptions{})
	if !slices.Equal(to.digests(), from.digests()) {
		t.Errorf("blobs %v, want %v", to.digests(), from.digests())
	}
}

func TestImportFailuresOfReading(t *testing.T) {
	from := newWorld(t)
	m := from.image("amd64", "one")
	archive := archiveOf(t, from.layout(annotated(m, v1.AnnotationRefName, "x:1"))...)
	to := newWorld(t)
	broken := errors.New("broken pipe")
	half := io.MultiReader(bytes.NewReader(archive[:len(archive)/2]), failing{broken})
	if _, err := transfer.Import(t.Context(), to.store, to.names, transfer.Stream(half), transfer.ImportOptions{}); !errors.Is(err, broken) || errdefs.IsDataLoss(err) {
		t.Errorf("a read that fails: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	stopping := io.MultiReader(bytes.NewReader(archive[:len(archive)/2]), call{cancel}, bytes.NewReader(archive[len(archive)/2:]))
	if _, err := transfer.Import(ctx, to.store, to.names, transfer.Stream(stopping), transfer.ImportOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	to.clean()
	equal(t, to.list())
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

type call struct{ f func() }

func (c call) Read([]byte) (int, error) { c.f(); return 0, io.EOF }
