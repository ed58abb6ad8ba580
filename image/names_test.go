package image

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"distkit/content"
	"distkit/disk/layout"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// writerEnv is set in the environment of a process of the test binary that names images and ends.
const writerEnv = "IMAGE_TEST_WRITER"

func TestMain(m *testing.M) {
	if args := os.Getenv(crashEnv); args != "" {
		crashProcess(args)
	}
	if args := os.Getenv(writerEnv); args != "" {
		var root, prefix string
		var n int
		if _, err := fmt.Sscanf(args, "%s %s %d", &root, &prefix, &n); err != nil {
			panic(err)
		}
		names := open(nil, root, DefaultNamespace)
		for i := range n {
			if _, err := names.Create(context.Background(), fmt.Sprintf("%s:%d", prefix, i), target("x")); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func open(t *testing.T, root, namespace string) *Names {
	store, err := content.Open(root)
	if err == nil {
		var names *Names
		if names, err = OpenNames(store, namespace); err == nil {
			err = putTargets(root)
		}
		if err == nil {
			return names
		}
	}
	if t == nil {
		panic(err)
	}
	t.Fatal(err)
	return nil
}

// entry gives a descriptor a name in the way another tool would, whatever the descriptor describes.
func (n *Names) entry(t *testing.T, name string, d v1.Descriptor) {
	t.Helper()
	err := n.change(t.Context(), func(ix *index) error {
		e, err := Image{Name: name, Target: d, Labels: d.Annotations}.entry()
		ix.Entries = append(ix.Entries, e)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// putTargets stores the manifests that target describes for these letters.
func putTargets(root string) error {
	dir := filepath.Join(root, "blobs", "sha256")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for c := 'a'; c <= 'z'; c++ {
		b := manifestOf(string(c))
		name := filepath.Join(dir, digest.FromString(b).Encoded())
		if _, err := os.Stat(name); err == nil {
			continue
		}
		if err := os.WriteFile(name, []byte(b), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func manifestOf(s string) string {
	return `{"schemaVersion":2,"config":{"mediaType":"` + v1.MediaTypeImageConfig + `","digest":"` + digest.FromString(s).String() + `","size":1},"layers":[]}`
}

// target describes a manifest that names can point at. There is one per letter.
func target(s string) v1.Descriptor {
	b := manifestOf(s)
	return v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromString(b), Size: int64(len(b))}
}

func TestCreateReplaceDelete(t *testing.T) {
	names := open(t, t.TempDir(), DefaultNamespace)
	if all, err := names.List(); err != nil || len(all) != 0 {
		t.Fatalf("a store without a layout: %v, %v", all, err)
	}
	d := target("a")
	d.Annotations = map[string]string{"k": "v", v1.AnnotationRefName: "not this"}
	made, err := names.Create(t.Context(), "example.org/a:1", d)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := names.Create(t.Context(), "example.org/a:1", target("b")); !errdefs.IsAlreadyExists(err) {
		t.Errorf("create again: %v", err)
	}
	got, err := names.Get("example.org/a:1")
	if err != nil || got.Target.Digest != target("a").Digest || got.Labels["k"] != "v" || len(got.Labels) != 1 {
		t.Errorf("get: %+v, %v", got, err)
	}
	if !got.CreatedAt.Equal(made.CreatedAt) || got.CreatedAt.IsZero() {
		t.Errorf("created at %v, read back as %v", made.CreatedAt, got.CreatedAt)
	}
	if _, err := names.Replace(t.Context(), "example.org/a:1", target("b")); err != nil {
		t.Fatal(err)
	}
	after, err := names.Get("example.org/a:1")
	if err != nil || after.Target.Digest != target("b").Digest || after.Labels["k"] != "v" {
		t.Errorf("after replace: %+v, %v", after, err)
	}
	if !after.CreatedAt.Equal(made.CreatedAt) || after.UpdatedAt.Before(got.UpdatedAt) {
		t.Errorf("times after replace: created %v, updated %v", after.CreatedAt, after.UpdatedAt)
	}
	if err := names.Delete(t.Context(), "example.org/a:1"); err != nil {
		t.Fatal(err)
	}
	if err := names.Delete(t.Context(), "example.org/a:1"); !errdefs.IsNotFound(err) {
		t.Errorf("delete again: %v", err)
	}
	if _, err := names.Get("example.org/a:1"); !errdefs.IsNotFound(err) {
		t.Errorf("get what was deleted: %v", err)
	}
}

// A listing has the names at one instant, and none that are added later.
func TestListing(t *testing.T) {
	names := open(t, t.TempDir(), DefaultNamespace)
	for _, name := range []string{"b", "a"} {
		if _, err := names.Create(t.Context(), name, target(name)); err != nil {
			t.Fatal(err)
		}
	}
	names.entry(t, "a", target("z")) // written by another tool, with a name that exists
	names.entry(t, "", target("u"))
	l, err := names.Read()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := names.Create(t.Context(), "c", target("c")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b"} {
		now, err := names.Get(name)
		if err != nil {
			t.Fatal(err)
		}
		if img, err := l.Get(name); err != nil || img.Target.Digest != target(name).Digest || fmt.Sprint(img) != fmt.Sprint(now) {
			t.Errorf("%s: %+v, %v", name, img, err)
		}
	}
	for _, name := range []string{"c", "", "none"} {
		if _, err := l.Get(name); !errdefs.IsNotFound(err) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if all, err := l.List(); err != nil || len(all) != 3 || all[0].Name != "a" || all[2].Name != "b" {
		t.Errorf("%+v, %v", all, err)
	}
}

func TestNamespacesShareBlobsNotNames(t *testing.T) {
	root := t.TempDir()
	if _, err := open(t, root, "default").Create(t.Context(), "n", target("a")); err != nil {
		t.Fatal(err)
	}
	other := open(t, root, "other")
	if all, err := other.List(); err != nil || len(all) != 0 {
		t.Errorf("another namespace has %v, %v", all, err)
	}
	if _, err := other.Create(t.Context(), "n", target("b")); err != nil {
		t.Fatal(err)
	}
	if img, err := open(t, root, "default").Get("n"); err != nil || img.Target.Digest != target("a").Digest {
		t.Errorf("the default namespace's name: %v, %v", img, err)
	}
	dir := filepath.Join(root, "namespaces", "other")
	if resolved, err := filepath.EvalSymlinks(filepath.Join(dir, "blobs")); err != nil || resolved != filepath.Join(root, "blobs") {
		t.Errorf("blobs of the namespace are %s, %v", resolved, err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "oci-layout")); err != nil || !strings.Contains(string(b), "1.0.0") {
		t.Errorf("oci-layout of the namespace: %s, %v", b, err)
	}
	store, err := content.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"", "..", "a/b", "a..b", ".a", "a-", strings.Repeat("a", 77), "a b", "ä"} {
		if _, err := OpenNames(store, bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("namespace %q: %v", bad, err)
		}
	}
}

// Entries that other tools wrote stay the same, including members that distkit does not know.
func TestForeignEntriesSurvive(t *testing.T) {
	root := t.TempDir()
	names := open(t, root, DefaultNamespace)
	if _, err := names.Create(t.Context(), "first", target("a")); err != nil {
		t.Fatal(err)
	}
	foreign := `{"schemaVersion":2,"annotations":{"a":"b"},"x-unknown":[1.50],"manifests":[` +
		`{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:` + strings.Repeat("1", 64) + `","size":1,"x-mine":{"deep":true}},` +
		`{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:` + strings.Repeat("2", 64) + `","size":1,"annotations":{"org.opencontainers.image.ref.name":"theirs","z":"1"}}]}`
	path := filepath.Join(root, "index.json")
	if err := os.WriteFile(path, []byte(foreign), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := names.Create(t.Context(), "ours", target("b")); err != nil {
		t.Fatal(err)
	}
	if err := names.Delete(t.Context(), "ours"); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var was, is any
	if err := json.Unmarshal([]byte(foreign), &was); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &is); err != nil {
		t.Fatal(err)
	}
	if a, b := fmt.Sprint(was), fmt.Sprint(is); a != b {
		t.Errorf("index.json was\n%s\nis\n%s", a, b)
	}
	all, err := names.List()
	if err != nil || len(all) != 1 || all[0].Name != "theirs" || all[0].Labels["z"] != "1" || !all[0].CreatedAt.IsZero() {
		t.Errorf("names: %+v, %v", all, err)
	}
}

func TestBadNamesAndLayouts(t *testing.T) {
	root := t.TempDir()
	names := open(t, root, DefaultNamespace)
	for _, bad := range []string{"", "a b", "a\nb", "a\tb", "\xff", strings.Repeat("a", maxName+1), "a\x1b[2J"} {
		if _, err := names.Create(t.Context(), bad, target("a")); !errdefs.IsInvalidArgument(err) {
			t.Errorf("name %q: %v", bad, err)
		}
	}
	if _, err := names.Create(t.Context(), "a", v1.Descriptor{Digest: "sha256:../../x"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a digest that is none: %v", err)
	}
	for _, text := range []string{"", "<html>", "[]", `{"manifests":"x"}`, `{"manifests":[1]}`} {
		if err := os.WriteFile(filepath.Join(root, "index.json"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := names.List(); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("index.json %q: %v", text, err)
		}
	}
}

// After a crash before the rename, a temporary file is left, which is harmless.
func TestLeftoverAsideIsOverwritten(t *testing.T) {
	root := t.TempDir()
	names := open(t, root, DefaultNamespace)
	if _, err := names.Create(t.Context(), "a", target("a")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "index.json.new"), []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := names.Create(t.Context(), "b", target("b")); err != nil {
		t.Fatal(err)
	}
	if all, err := names.List(); err != nil || len(all) != 2 {
		t.Errorf("names: %v, %v", all, err)
	}
	if _, err := os.Stat(filepath.Join(root, "index.json.new")); !os.IsNotExist(err) {
		t.Errorf("index.json.new stays: %v", err)
	}
}

// When processes and goroutines write at the same time, no name is lost.
func TestParallelWritersLoseNothing(t *testing.T) {
	root := t.TempDir()
	const processes, goroutines, each = 4, 4, 10
	var wg sync.WaitGroup
	for p := range processes {
		wg.Go(func() {
			c := exec.Command(os.Args[0])
			c.Env = append(os.Environ(), fmt.Sprintf("%s=%s process%d %d", writerEnv, root, p, each))
			if out, err := c.CombinedOutput(); err != nil {
				t.Errorf("writer %d: %v: %s", p, err, out)
			}
		})
	}
	names := open(t, root, DefaultNamespace)
	for g := range goroutines {
		wg.Go(func() {
			for i := range each {
				if _, err := names.Create(t.Context(), fmt.Sprintf("goroutine%d:%d", g, i), target("x")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	all, err := names.List()
	if err != nil || len(all) != (processes+goroutines)*each {
		t.Errorf("%d names, want %d; %v", len(all), (processes+goroutines)*each, err)
	}
}

func TestUpdateChangesOnlyTheFieldsNamed(t *testing.T) {
	names := open(t, t.TempDir(), DefaultNamespace)
	if _, err := names.Create(t.Context(), "n", target("a")); err != nil {
		t.Fatal(err)
	}
	update := func(labels map[string]string, d v1.Descriptor, paths ...string) (Image, error) {
		return names.Update(t.Context(), Image{Name: "n", Target: d, Labels: labels}, paths...)
	}
	img, err := update(map[string]string{"a": "1", "b": "2", "c": "3"}, target("b"), "labels.a", "labels.b")
	if err != nil || img.Target.Digest != target("a").Digest || fmt.Sprint(img.Labels) != "map[a:1 b:2]" {
		t.Errorf("labels.a, labels.b: %+v, %v", img, err)
	}
	if img, err = update(nil, target("b"), "target", "labels.a"); err != nil || img.Target.Digest != target("b").Digest || fmt.Sprint(img.Labels) != "map[b:2]" {
		t.Errorf("target, labels.a: %+v, %v", img, err)
	}
	if img, err = update(map[string]string{"z": "9"}, target("c"), "labels"); err != nil || img.Target.Digest != target("b").Digest || fmt.Sprint(img.Labels) != "map[z:9]" {
		t.Errorf("labels: %+v, %v", img, err)
	}
	if got, err := names.Get("n"); err != nil || fmt.Sprint(got) != fmt.Sprint(img) {
		t.Errorf("read back %+v, %v", got, err)
	}
	for _, paths := range [][]string{nil, {"name"}, {"labels."}, {"labels." + AnnotationCreated}} {
		if _, err := update(nil, target("a"), paths...); !errdefs.IsInvalidArgument(err) {
			t.Errorf("paths %q: %v", paths, err)
		}
	}
	if _, err := names.Update(t.Context(), Image{Name: "other"}, "labels"); !errdefs.IsNotFound(err) {
		t.Errorf("a name that isn't there: %v", err)
	}
}

func TestNamespaceLife(t *testing.T) {
	root := t.TempDir()
	store, err := content.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	all := OpenNamespaces(store)
	list := func(want string) {
		t.Helper()
		if got, err := all.List(); err != nil || fmt.Sprint(got) != want {
			t.Errorf("namespaces %v, want %s; %v", got, want, err)
		}
	}
	list("[default]")
	if err := all.Create(t.Context(), "a", map[string]string{"k": "v"}); err != nil {
		t.Fatal(err)
	}
	if err := all.Create(t.Context(), "a", nil); !errdefs.IsAlreadyExists(err) {
		t.Errorf("create again: %v", err)
	}
	if _, err := open(t, root, "b").Create(t.Context(), "n", target("a")); err != nil {
		t.Fatal(err)
	}
	list("[a b default]")
	if labels, err := all.SetLabels(t.Context(), "a", map[string]string{"k": "", "l": "1"}); err != nil || fmt.Sprint(labels) != "map[l:1]" {
		t.Errorf("labels %v, %v", labels, err)
	}
	if labels, err := all.Labels("a"); err != nil || fmt.Sprint(labels) != "map[l:1]" {
		t.Errorf("labels read back %v, %v", labels, err)
	}
	if err := all.Delete(t.Context(), "b"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete one with a name: %v", err)
	}
	if err := os.MkdirAll(filepath.Join(root, "containers", "a", "c"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := all.Delete(t.Context(), "a"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete one with a container: %v", err)
	}
	if err := os.Remove(filepath.Join(root, "containers", "a", "c")); err != nil {
		t.Fatal(err)
	}
	for namespace, is := range map[string]func(error) bool{
		"a": func(err error) bool { return err == nil }, "default": errdefs.IsFailedPrecondition,
		"none": errdefs.IsNotFound, "../x": errdefs.IsInvalidArgument,
	} {
		if err := all.Delete(t.Context(), namespace); !is(err) {
			t.Errorf("delete %s: %v", namespace, err)
		}
	}
	list("[b default]")
}

// When a name gets a new target, in whatever way, labels that describe the content are replaced, and the user's own
// labels stay.
func TestLabelsFollowTheTarget(t *testing.T) {
	const version, source = "org.opencontainers.image.version", layout.LabelSource + "docker.io"
	names := open(t, t.TempDir(), DefaultNamespace)
	with := func(letter string, labels ...string) v1.Descriptor {
		d := target(letter)
		d.Annotations = map[string]string{}
		for i := 0; i < len(labels); i += 2 {
			d.Annotations[labels[i]] = labels[i+1]
		}
		return d
	}
	for how, point := range map[string]func(v1.Descriptor) error{
		"Replace": func(d v1.Descriptor) error {
			_, err := names.Replace(t.Context(), "Replace", d)
			return err
		},
		"ReplaceAll": func(d v1.Descriptor) error {
			labels := d.Annotations
			d.Annotations = map[string]string{"no": "label"}
			return names.ReplaceAll(t.Context(), []Image{{Name: "ReplaceAll", Target: d, Labels: labels}})
		},
		"Update": func(d v1.Descriptor) error {
			paths := []string{"target"}
			for k := range d.Annotations {
				paths = append(paths, "labels."+k)
			}
			_, err := names.Update(t.Context(), Image{Name: "Update", Target: d, Labels: d.Annotations}, paths...)
			return err
		},
	} {
		if _, err := names.Create(t.Context(), how, with("a", version, "1", source, "x", "team", "core", "tier", "1")); err != nil {
			t.Fatal(err)
		}
		for _, step := range []struct {
			d    v1.Descriptor
			want string
		}{
			{with("a", source, "y", "tier", ""), "map[" + source + ":y " + version + ":1 team:core]"},
			{with("b", source, "z", "empty", "", v1.AnnotationRefName, "x"), "map[" + source + ":z team:core]"},
			{with("c", "team", "web"), "map[team:web]"},
		} {
			given := maps.Clone(step.d.Annotations)
			if how == "Update" {
				delete(step.d.Annotations, v1.AnnotationRefName)
			}
			if err := point(step.d); err != nil {
				t.Fatalf("%s: %v", how, err)
			}
			img, err := names.Get(how)
			if got := fmt.Sprint(img.Labels); err != nil || got != step.want || img.Target.Digest != step.d.Digest {
				t.Errorf("%s: %s, want %s; %v", how, got, step.want, err)
			}
			if how == "Replace" && !maps.Equal(given, step.d.Annotations) {
				t.Errorf("the caller's map was %v, and is %v", given, step.d.Annotations)
			}
		}
	}
}

func TestRename(t *testing.T) {
	root := t.TempDir()
	names, other, first := open(t, root, "m"), open(t, root, "z"), open(t, root, "a")
	d := target("a")
	d.Annotations = map[string]string{"k": "v"}
	made, err := names.Create(t.Context(), "n", d)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"taken", "last"} {
		if _, err := names.Create(t.Context(), name, target("b")); err != nil {
			t.Fatal(err)
		}
	}
	names.entry(t, "taken", target("c"))
	for _, c := range []struct {
		old     string
		to      *Names
		name    string
		replace bool
		is      func(error) bool
	}{
		{"none", names, "x", false, errdefs.IsNotFound}, {"none", other, "x", false, errdefs.IsNotFound}, {"none", first, "n", true, errdefs.IsNotFound},
		{"n", names, "taken", false, errdefs.IsAlreadyExists}, {"n", names, "n", true, errdefs.IsInvalidArgument},
		{"n", names, "a b", false, errdefs.IsInvalidArgument}, {"n", other, string(d.Digest), false, errdefs.IsInvalidArgument},
	} {
		if _, err := names.Rename(t.Context(), c.old, c.to, c.name, c.replace); !c.is(err) {
			t.Errorf("%s to %s of %s: %v", c.old, c.name, c.to.namespace, err)
		}
	}
	from, name := names, "n"
	for _, step := range []struct {
		to   *Names
		name string
	}{{names, "new"}, {other, "new"}, {first, "other"}, {names, "taken"}} {
		img, err := from.Rename(t.Context(), name, step.to, step.name, true)
		if err != nil || img.Name != step.name {
			t.Fatalf("%s of %s to %s of %s: %+v, %v", name, from.namespace, step.name, step.to.namespace, img, err)
		}
		got, err := step.to.Get(step.name)
		if err != nil || fmt.Sprint(got) != fmt.Sprint(img) || got.Target.Digest != d.Digest || got.Labels["k"] != "v" || !got.CreatedAt.Equal(made.CreatedAt) {
			t.Errorf("%+v, %v", got, err)
		}
		if _, err := from.Get(name); !errdefs.IsNotFound(err) {
			t.Errorf("the old name: %v", err)
		}
		from, name = step.to, step.name
	}
	if all, err := names.List(); err != nil || len(all) != 2 {
		t.Errorf("%+v, %v", all, err)
	}
	// A crash between the changes of two namespaces leaves the name in both. Only the same call, repeated, completes
	// the move.
	left, err := names.Get("taken")
	if err != nil {
		t.Fatal(err)
	}
	err = other.change(t.Context(), func(ix *index) error {
		e, err := left.entry()
		ix.Entries = append(ix.Entries, e)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := names.Rename(t.Context(), "last", other, "taken", false); !errdefs.IsAlreadyExists(err) {
		t.Errorf("another name: %v", err)
	}
	if _, err := names.Rename(t.Context(), "taken", other, "taken", false); err != nil {
		t.Error(err)
	}
	if _, err := other.Rename(t.Context(), "taken", names, "taken", false); err != nil {
		t.Error(err)
	}
	for _, n := range []*Names{other, first} {
		if all, err := n.List(); err != nil || len(all) != 0 {
			t.Errorf("%s: %+v, %v", n.namespace, all, err)
		}
	}
}

// Calls that move names between namespaces in both directions, while a namespace is removed, never deadlock and never
// lose a name.
func TestRenamesBetweenNamespaces(t *testing.T) {
	root := t.TempDir()
	all := []*Names{open(t, root, DefaultNamespace), open(t, root, "a"), open(t, root, "z")}
	var wg sync.WaitGroup
	for g := range 6 {
		name := fmt.Sprint("n", g)
		if _, err := all[0].Create(t.Context(), name, target("a")); err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			at := 0
			for i := range 20 {
				to := (at + 1 + (g+i)%2) % 3
				if _, err := all[at].Rename(t.Context(), name, all[to], name, false); err != nil {
					t.Errorf("%s from %s to %s: %v", name, all[at].namespace, all[to].namespace, err)
					return
				}
				at = to
			}
		})
	}
	wg.Go(func() {
		for range 20 {
			err := OpenNamespaces(all[0].store).Delete(t.Context(), "a")
			if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	n := 0
	for _, names := range all {
		list, err := names.List()
		if err != nil {
			t.Error(err)
		}
		n += len(list)
	}
	if n != 6 {
		t.Errorf("%d names, not 6", n)
	}
}

// An entry that is not a descriptor does not hide the others, and can be removed.
func TestStrangeEntries(t *testing.T) {
	root := t.TempDir()
	names := open(t, root, DefaultNamespace)
	if _, err := names.Create(t.Context(), "good", target("a")); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(root, "index.json")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	strange := `[{"digest":"sha256:x","annotations":{"` + v1.AnnotationRefName + `":"bad","k":1}},` + `{"annotations":{"` + v1.AnnotationRefName + `":{}}},7,`
	if err := os.WriteFile(path, []byte(strings.Replace(string(b), "[", strange, 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	if all, err := names.List(); !errdefs.IsFailedPrecondition(err) || len(all) != 1 || all[0].Name != "good" {
		t.Errorf("%+v, %v", all, err)
	}
	if _, err := names.Get("bad"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the strange one: %v", err)
	}
	if _, err := names.Create(t.Context(), "new", target("b")); err != nil {
		t.Error(err)
	}
	if _, err := names.Replace(t.Context(), "bad", target("b")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("replace the strange one: %v", err)
	}
	if err := names.Delete(t.Context(), "bad"); err != nil {
		t.Error(err)
	}
	if all, err := names.List(); !errdefs.IsFailedPrecondition(err) || len(all) != 2 {
		t.Errorf("%+v, %v", all, err)
	}
	if b, err = os.ReadFile(path); err != nil || !strings.Contains(string(b), `":{}}},7,`) {
		t.Errorf("%s, %v", b, err)
	}
}

// All names that exist are removed in one change. Entries without a name are removed by their digest.
func TestDeleteAll(t *testing.T) {
	root := t.TempDir()
	names := open(t, root, DefaultNamespace)
	for _, name := range []string{"a", "b", "c"} {
		if _, err := names.Create(t.Context(), name, target(name)); err != nil {
			t.Fatal(err)
		}
	}
	names.entry(t, "c", target("z")) // a second entry, as another tool may write it
	names.entry(t, "", target("a"))
	names.entry(t, "", target("u"))
	path := filepath.Join(root, "index.json")
	same := func(f func() error) (unchanged bool) {
		t.Helper()
		before, err := os.Stat(path)
		if err == nil {
			err = f()
		}
		after, serr := os.Stat(path)
		if err != nil || serr != nil {
			t.Fatal(err, serr)
		}
		return os.SameFile(before, after)
	}
	remove := func(f func(context.Context, []string) ([]error, error), want string, keys ...string) {
		t.Helper()
		var got strings.Builder
		unchanged := same(func() error {
			errs, err := f(t.Context(), keys)
			for _, err := range errs {
				fmt.Fprint(&got, map[bool]string{true: "+", false: "-"}[err == nil])
				if err != nil && !errdefs.IsNotFound(err) {
					t.Error(err)
				}
			}
			return err
		})
		if got.String() != want || unchanged != !strings.Contains(want, "+") {
			t.Errorf("%q: %s, want %s; unchanged: %t", keys, &got, want, unchanged)
		}
	}
	a, b, u := string(target("a").Digest), string(target("b").Digest), string(target("u").Digest)
	remove(names.DeleteAll, "-+-+-", "none", "c", "c", "a", "")
	remove(names.DeleteAll, "--", a, "c")
	remove(names.DeleteAll, "")
	remove(names.DeleteUnnamed, "-+--", b, u, "", "b")
	if all, err := names.List(); err != nil || len(all) != 1 || all[0].Name != "b" {
		t.Errorf("%+v, %v", all, err)
	}
	remove(names.DeleteUnnamed, "+", a)
	ix, err := names.read()
	if err != nil || len(ix.Entries) != 1 {
		t.Errorf("%d entries, %v", len(ix.Entries), err)
	}
}

// Creating a namespace is exclusive: only one of several callers at the same time creates it, with that caller's
// labels.
func TestNamespaceIsClaimedOnce(t *testing.T) {
	store, err := content.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for round := range 10 {
		namespace := fmt.Sprint("ns", round)
		errs := make([]error, 8)
		var wg sync.WaitGroup
		for i := range errs {
			wg.Go(func() {
				errs[i] = OpenNamespaces(store).Create(t.Context(), namespace, map[string]string{"by": fmt.Sprint(i), fmt.Sprint("l", i): "1"})
			})
		}
		wg.Wait()
		var winners []int
		for i, err := range errs {
			if err == nil {
				winners = append(winners, i)
			} else if !errdefs.IsAlreadyExists(err) {
				t.Error(err)
			}
		}
		if len(winners) != 1 {
			t.Fatalf("%s: %v have made it", namespace, winners)
		}
		if labels, err := OpenNamespaces(store).Labels(namespace); err != nil || len(labels) != 2 || labels["by"] != fmt.Sprint(winners[0]) {
			t.Errorf("%s by %v: labels %v, %v", namespace, winners, labels, err)
		}
	}
}

// A namespace that has snapshots is not removed, because the snapshots would belong to the next namespace of that name.
func TestNamespaceWithSnapshotsStays(t *testing.T) {
	root := t.TempDir()
	store, err := content.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	all := OpenNamespaces(store)
	for _, namespace := range []string{"a", "b"} {
		if err := all.Create(t.Context(), namespace, nil); err != nil {
			t.Fatal(err)
		}
	}
	for path, text := range map[string]string{
		"1/info": `{"key":"k","namespace":"a","kind":"Active"}`, "2/info": `{"key":"sha256:x"}`, "3/info": "", "keys/x": "", "state": "",
	} {
		path = filepath.Join(root, "snapshots", "native", path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := all.Delete(t.Context(), "a"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), `snapshot "k" of native`) {
		t.Errorf("delete one with a snapshot: %v", err)
	}
	if err := all.Delete(t.Context(), "b"); err != nil {
		t.Error(err)
	}
}

// A namespace may be removed while others add names to it. Either each name is kept, or the removal fails.
func TestRemovalOfANamespaceLosesNoName(t *testing.T) {
	root := t.TempDir()
	store, err := content.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	var writers, removers sync.WaitGroup
	done := make(chan struct{})
	removers.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			err := OpenNamespaces(store).Delete(t.Context(), "ns")
			if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
				t.Errorf("delete: %v", err)
				return
			}
		}
	})
	for g := range 4 {
		writers.Go(func() {
			for i := range 20 {
				name := fmt.Sprintf("g%d:%d", g, i)
				names := open(t, root, "ns")
				if _, err := names.Create(t.Context(), name, target("x")); err != nil {
					t.Errorf("create: %v", err)
					return
				}
				if _, err := names.Get(name); err != nil {
					t.Errorf("get: %v", err)
					return
				}
				if err := names.Delete(t.Context(), name); err != nil {
					t.Errorf("delete name: %v", err)
					return
				}
			}
		})
	}
	writers.Wait()
	close(done)
	removers.Wait()
}

// The error for a name that is not there says how to fetch it, if it begins with a registry.
func TestMissingNamesSayHowToFetchThem(t *testing.T) {
	t.Parallel()
	none := func(string) int { return -1 }
	for name, want := range map[string]bool{
		"docker.io/library/redis:latest": true, "localhost:5000/x": true, "registry.example/x@sha256:" + strings.Repeat("0", 64): true,
		"redis": false, "library/redis": false, "docker.io/": false, "docker.io/UPPER": false, "docker.io/a\x1b[31m": false, "": false,
	} {
		err := missing(none, name)
		if !errdefs.IsNotFound(err) || strings.Contains(err.Error(), "dist-pull "+name+" ") != want {
			t.Errorf("%q: %v", name, err)
		}
	}
}
