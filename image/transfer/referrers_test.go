package transfer_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strconv"
	"testing"

	"distkit/disk/layout"
	"distkit/image"
	"distkit/image/transfer"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// attach stores an artifact that refers to a subject, and lists it. If the text is empty, its layer is missing.
func (w *world) attach(subject v1.Descriptor, artifactType, text string) v1.Descriptor {
	w.t.Helper()
	subject.Platform = nil
	layer := v1.Descriptor{MediaType: "text/plain", Digest: digest.FromString("missing" + string(subject.Digest)), Size: 7}
	if text != "" {
		layer = w.put("text/plain", []byte(text), digest.SHA256)
	}
	d := w.putJSON(v1.MediaTypeImageManifest, v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, ArtifactType: artifactType,
		Config: w.put(v1.MediaTypeEmptyJSON, []byte("{}"), digest.SHA256), Layers: []v1.Descriptor{layer}, Subject: &subject,
	})
	if err := w.names.AddReferrers(w.t.Context(), []layout.Referrer{{Descriptor: d, Subject: subject.Digest}}); err != nil {
		w.t.Fatal(err)
	}
	return d
}

func (w *world) referrers() map[digest.Digest][]v1.Descriptor {
	w.t.Helper()
	all, err := w.names.ReferrersOf()
	if err != nil {
		w.t.Fatal(err)
	}
	return all
}

// listed returns the digests of the referrers that a store lists.
func (w *world) listed() (all []digest.Digest) {
	w.t.Helper()
	for _, list := range w.referrers() {
		for _, d := range list {
			all = append(all, d.Digest)
		}
	}
	slices.Sort(all)
	return all
}

// An export includes referrers, and an import stores them, if they belong to the images that were selected.
func TestReferrersTravelInArchives(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	amd, arm := w.image("amd64", "a"), w.image("arm64", "b")
	ix := w.index(amd, arm)
	w.name("x:1", ix)
	w.name("other:1", w.index(w.image("amd64", "c"), w.image("arm64", "c")))
	ofIndex := w.attach(ix, "a/signature", "of the index").Digest
	sbom := w.attach(amd, "a/sbom", "of amd64")
	ofSBOM := w.attach(sbom, "a/signature", "of the SBOM").Digest
	ofARM := w.attach(arm, "a/signature", "of arm64").Digest
	w.attach(w.image("riscv64", "d"), "a/signature", "of what goes nowhere")
	sorted := func(all ...digest.Digest) []digest.Digest { slices.Sort(all); return all }

	for what, c := range map[string]struct {
		export transfer.ExportOptions
		in     transfer.ImportOptions
		want   []digest.Digest
		ignore int
	}{
		"all":                   {transfer.ExportOptions{Select: transfer.All}, transfer.ImportOptions{Referrers: true}, sorted(ofIndex, sbom.Digest, ofSBOM, ofARM), 0},
		"not wanted":            {transfer.ExportOptions{Select: transfer.All}, transfer.ImportOptions{}, nil, 0},
		"of a type":             {transfer.ExportOptions{Select: transfer.All, ArtifactTypes: []string{"a/signature"}}, transfer.ImportOptions{Referrers: true}, sorted(ofIndex, ofARM), 0},
		"of a type, in":         {transfer.ExportOptions{Select: transfer.All}, transfer.ImportOptions{Referrers: true, ArtifactTypes: []string{"a/sbom"}}, sorted(sbom.Digest), 0},
		"one platform":          {transfer.ExportOptions{Select: transfer.One}, transfer.ImportOptions{Referrers: true}, sorted(sbom.Digest, ofSBOM), 0},
		"one platform, in":      {transfer.ExportOptions{Select: transfer.All}, transfer.ImportOptions{Referrers: true, Select: transfer.One, Platform: only(t, "linux/arm64")}, sorted(ofARM), 3},
		"two images, one taken": {transfer.ExportOptions{Select: transfer.All}, transfer.ImportOptions{Referrers: true, Only: []string{"other:1"}}, nil, 4},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			w := &world{t, w.store, w.names}
			c.export.Referrers = w.referrers()
			archive := w.mustSave(c.export, "x:1", "other:1")
			if again := w.mustSave(c.export, "other:1", "x:1"); string(again) != string(archive) {
				t.Error("the same images give other bytes")
			}
			to, ignored := newWorld(t), 0
			c.in.Ignored = func(n int) { ignored += n }
			if _, err := to.load(archive, c.in); err != nil {
				t.Fatal(err)
			}
			if got := to.listed(); !slices.Equal(got, c.want) || ignored != c.ignore {
				t.Errorf("%q, not %q; %d are ignored", got, c.want, ignored)
			}
		})
	}
}

// A referrer that is incomplete is an error, except in a sparse export. A referrer that no list can have is an error,
// too.
func TestReferrersThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	d := w.image("amd64", "a")
	w.name("x:1", d)
	other := w.attach(w.image("arm64", "b"), "a/signature", "of another")
	lie := map[digest.Digest][]v1.Descriptor{d.Digest: {other}}
	if _, err := w.save(transfer.ExportOptions{Referrers: lie}, "x:1"); !errdefs.IsDataLoss(err) {
		t.Errorf("not a referrer of that: %v", err)
	}
	w.attach(d, "a/signature", "")
	if _, err := w.save(transfer.ExportOptions{Referrers: w.referrers()}, "x:1"); !errdefs.IsNotFound(err) {
		t.Errorf("its layer is missing: %v", err)
	}
	_, index, _ := contents(t, w.mustSave(transfer.ExportOptions{Referrers: w.referrers(), Select: transfer.Sparse}, "x:1"))
	if len(index.Manifests) != 1 {
		t.Errorf("sparse: %+v", index.Manifests)
	}
	// A list has only documents that are stored, whatever refers to a subject.
	gone := v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromString("gone"), Size: 4}
	before := len(w.referrers()[d.Digest])
	w.entry("x:"+layout.ReferrerTags(d.Digest, "")[0].Tag, gone)
	if all := w.referrers()[d.Digest]; len(all) != before {
		t.Errorf("%+v", all)
	}
	deep := w.image("s390x", "c")
	w.name("deep:1", deep)
	for i := range image.MaxDepth + 1 {
		deep = w.attach(deep, "a/b", strconv.Itoa(i))
	}
	if _, err := w.save(transfer.ExportOptions{Referrers: w.referrers()}, "deep:1"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("too deep: %v", err)
	}
}

// Only the document decides whether it is a referrer, not the archive. If the gate fails, nothing gets a name.
func TestReferrersOfHostileArchives(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	d := w.image("amd64", "a")
	w.name("x:1", d)
	w.attach(d, "a/signature", "good")
	archive := w.mustSave(transfer.ExportOptions{Referrers: w.referrers()}, "x:1")
	change := func(f func(*v1.Index)) []byte { return reindex(t, archive, f) }
	// The archive can't make an image a referrer, or state another type or size.
	to := newWorld(t)
	lies := change(func(ix *v1.Index) {
		for i := range ix.Manifests {
			ix.Manifests[i].ArtifactType = "a/lie"
		}
		ix.Manifests[0].Annotations[layout.AnnotationSubject] = string(digest.FromString("x"))
		ix.Manifests[1].Size = 1
	})
	if _, err := to.load(lies, transfer.ImportOptions{Referrers: true, ArtifactTypes: []string{"a/signature"}}); err != nil || len(to.listed()) != 1 {
		t.Errorf("%v, %v", to.listed(), err)
	}
	if img, err := to.names.Get("x:1"); err != nil || len(img.Labels) != 0 {
		t.Errorf("%+v, %v", img, err)
	}
	// A referrer that is not in the archive is ignored.
	to = newWorld(t)
	gone := change(func(ix *v1.Index) { ix.Manifests[1].Digest = digest.FromString("gone") })
	if _, err := to.load(gone, transfer.ImportOptions{Referrers: true}); err != nil || len(to.listed()) != 0 {
		t.Errorf("%v, %v", to.listed(), err)
	}
	// If nothing else is in the archive, this is an image that is missing.
	damaged := change(func(ix *v1.Index) {
		ix.Manifests = ix.Manifests[:1]
		ix.Manifests[0].Digest, ix.Manifests[0].Annotations = digest.FromString("gone"), nil
	})
	for _, name := range []string{"", "y:1"} {
		_, plain := to.load(damaged, transfer.ImportOptions{Name: name})
		if _, err := to.load(damaged, transfer.ImportOptions{Name: name, Referrers: true}); plain == nil || err == nil || err.Error() != plain.Error() {
			t.Errorf("name %q: with referrers %v, without %v", name, err, plain)
		}
	}
}

// reindex changes the index.json of an archive.
func reindex(t *testing.T, archive []byte, f func(*v1.Index)) []byte {
	t.Helper()
	var out bytes.Buffer
	r, w := tar.NewReader(bytes.NewReader(archive)), tar.NewWriter(&out)
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		b, rerr := io.ReadAll(r)
		if err := errors.Join(err, rerr); err != nil {
			t.Fatal(err)
		}
		if h.Name == v1.ImageIndexFile {
			var ix v1.Index
			if err := json.Unmarshal(b, &ix); err != nil {
				t.Fatal(err)
			}
			f(&ix)
			b = asJSON(t, ix)
			h.Size = int64(len(b))
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}
