package image

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"distkit/content"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// fixture is a store, to which tests add documents.
type fixture struct {
	t     *testing.T
	store *content.Store
}

func newFixture(t *testing.T) fixture {
	store, err := content.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return fixture{t, store}
}

func (f fixture) add(mediaType string, doc any) v1.Descriptor {
	f.t.Helper()
	b, ok := doc.([]byte)
	if !ok {
		var err error
		if b, err = json.Marshal(doc); err != nil {
			f.t.Fatal(err)
		}
	}
	dgst := digest.FromBytes(b)
	_, err := content.WriteBlob(f.t.Context(), f.store, dgst.String(), strings.NewReader(string(b)), int64(len(b)), dgst)
	if err != nil && !errdefs.IsAlreadyExists(err) {
		f.t.Fatal(err)
	}
	return v1.Descriptor{MediaType: mediaType, Digest: dgst, Size: int64(len(b))}
}

func (f fixture) image(arch string, layers int) v1.Descriptor {
	config := v1.Image{Platform: v1.Platform{OS: "linux", Architecture: arch}, RootFS: v1.RootFS{Type: "layers"}}
	manifest := v1.Manifest{MediaType: v1.MediaTypeImageManifest}
	for i := range layers {
		text := fmt.Sprintf("%s layer %d", arch, i)
		manifest.Layers = append(manifest.Layers, f.add(v1.MediaTypeImageLayer, []byte(text)))
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromString(text))
	}
	manifest.Config = f.add(v1.MediaTypeImageConfig, config)
	d := f.add(v1.MediaTypeImageManifest, manifest)
	d.Platform = &v1.Platform{OS: "linux", Architecture: arch}
	return d
}

func (f fixture) index(manifests ...v1.Descriptor) v1.Descriptor {
	return f.add(v1.MediaTypeImageIndex, v1.Index{MediaType: v1.MediaTypeImageIndex, Manifests: manifests})
}

func (f fixture) walker(platform string) Walker {
	w := Walker{Store: f.store}
	if platform != "" {
		var err error
		if w.Platform, err = ParsePlatform(platform); err != nil {
			f.t.Fatal(err)
		}
	}
	return w
}

func TestManifestOfPlatform(t *testing.T) {
	f := newFixture(t)
	amd64, arm64 := f.image("amd64", 1), f.image("arm64", 1)
	armv7, armv6 := f.image("arm", 1), f.image("arm", 2)
	armv7.Platform.Variant, armv6.Platform.Variant = "v7", "v6"
	attestation := f.image("none", 0)
	attestation.Platform = &v1.Platform{OS: "unknown", Architecture: "unknown"}
	ix := f.index(attestation, armv6, armv7, arm64, amd64)
	nested := f.index(ix)
	for platform, want := range map[string]v1.Descriptor{
		"linux/amd64": amd64, "linux/arm64": arm64, "linux/arm/v7": armv7, "linux/arm/v6": armv6,
	} {
		for _, from := range []v1.Descriptor{ix, nested, want} {
			got, err := f.walker(platform).Manifest(t.Context(), from)
			if err != nil || got.Digest != want.Digest {
				t.Errorf("%s from %s: %v, %v", platform, from.MediaType, got.Digest, err)
			}
		}
	}
	_, err := f.walker("linux/s390x").Manifest(t.Context(), ix)
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "linux/arm64") || strings.Contains(err.Error(), "unknown") {
		t.Errorf("a platform that isn't there: %v", err)
	}
	if _, err := f.walker("").Manifest(t.Context(), ix); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no platform, many manifests: %v", err)
	}
}

// If no index describes a manifest, its platform is that in its config. It is refused if that is not the requested
// platform.
func TestAManifestForAnotherPlatformIsRefused(t *testing.T) {
	f := newFixture(t)
	arm64 := f.image("arm64", 1)
	told := arm64
	arm64.Platform = nil
	unsaid := f.add(v1.MediaTypeImageManifest, v1.Manifest{MediaType: v1.MediaTypeImageManifest,
		Config: f.add(v1.MediaTypeImageConfig, []byte(`{}`)), Layers: []v1.Descriptor{}})
	artifact := f.add(v1.MediaTypeImageManifest, v1.Manifest{MediaType: v1.MediaTypeImageManifest,
		Config: f.add("application/x", []byte(`{"os":"plan9","architecture":"386"}`)), Layers: []v1.Descriptor{}})
	for _, d := range []v1.Descriptor{arm64, told, f.index(arm64)} {
		for _, platform := range []string{"linux/s390x", "windows/arm64"} {
			_, err := f.walker(platform).Manifest(t.Context(), d)
			if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "linux/arm64") || !strings.Contains(err.Error(), platform) {
				t.Errorf("%s of %s: %v", platform, d.MediaType, err)
			}
			if _, err := f.walker(platform).Missing(t.Context(), d); !errdefs.IsNotFound(err) {
				t.Errorf("what is missing for %s of %s: %v", platform, d.MediaType, err)
			}
			if c, err := f.walker(platform).Children(t.Context(), arm64); err != nil || len(c) != 2 {
				t.Errorf("children for %s: %v, %v", platform, c, err) // during a pull, the config comes later
			}
		}
		if _, err := f.walker("linux/arm64").Layers(t.Context(), d); err != nil {
			t.Errorf("its own platform: %v", err)
		}
	}
	for _, d := range []v1.Descriptor{unsaid, artifact} {
		if _, err := f.walker("linux/amd64").Manifest(t.Context(), d); err != nil {
			t.Errorf("a manifest for no platform: %v", err)
		}
	}
	other := f.image("none", 0)
	other.Platform = nil
	local, err := ParsePlatform("local")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (Walker{Store: f.store, Platform: local}).Manifest(t.Context(), other); !errdefs.IsNotFound(err) {
		t.Errorf("local: %v", err)
	}
	unasked, err := ParsePlatform("")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (Walker{Store: f.store, Platform: unasked}).Manifest(t.Context(), other); err != nil {
		t.Errorf("what is alone, and no platform asked for: %v", err)
	}
	if err := f.store.Delete(t.Context(), digest.FromString("arm64 layer 0")); err != nil {
		t.Fatal(err)
	}
	if missing, err := f.walker("linux/arm64").Missing(t.Context(), arm64); err != nil || len(missing) != 1 {
		t.Errorf("missing: %v, %v", missing, err)
	}
}

// A checkpoint is an index with one image and with other objects.
func TestManifestBesideOthers(t *testing.T) {
	f := newFixture(t)
	image := f.image("amd64", 1)
	image.Platform = nil
	other := f.add("application/vnd.containerd.container.criu.checkpoint.criu.tar", []byte("state"))
	got, err := f.walker("linux/amd64").Manifest(t.Context(), f.index(other, image))
	if err != nil || got.Digest != image.Digest {
		t.Errorf("%v, %v", got.Digest, err)
	}
	if _, err := f.walker("linux/amd64").Manifest(t.Context(), f.index(other)); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "has no image") {
		t.Errorf("without an image: %v", err)
	}
}

func TestLayersHaveChainIDs(t *testing.T) {
	f := newFixture(t)
	layers, err := f.walker("linux/amd64").Layers(t.Context(), f.image("amd64", 3))
	if err != nil || len(layers) != 3 {
		t.Fatalf("%v, %v", layers, err)
	}
	chain := layers[0].DiffID
	for i, l := range layers {
		if want := digest.FromString(fmt.Sprintf("amd64 layer %d", i)); l.DiffID != want || l.Digest != want {
			t.Errorf("layer %d is %v, diff ID %v", i, l.Digest, l.DiffID)
		}
		if i > 0 {
			chain = digest.FromString(string(chain) + " " + string(l.DiffID))
		}
		if l.ChainID != chain {
			t.Errorf("chain ID %d is %v, want %v", i, l.ChainID, chain)
		}
	}
}

func TestChildrenAndMissing(t *testing.T) {
	f := newFixture(t)
	amd64, arm64 := f.image("amd64", 2), f.image("arm64", 1)
	ix := f.index(amd64, arm64)
	w, all := f.walker("linux/amd64"), f.walker("")
	count := func(w Walker, d v1.Descriptor, want int) {
		t.Helper()
		if c, err := w.Children(t.Context(), d); err != nil || len(c) != want {
			t.Errorf("children of %s: %d, want %d; %v", d.MediaType, len(c), want, err)
		}
	}
	count(w, ix, 1)
	count(all, ix, 2)
	count(w, amd64, 3)
	layers, err := f.walker("linux/arm64").Layers(t.Context(), ix)
	if err != nil {
		t.Fatal(err)
	}
	count(w, layers[0].Descriptor, 0)

	if err := f.store.Delete(t.Context(), layers[0].Digest); err != nil {
		t.Fatal(err)
	}
	if missing, err := w.Missing(t.Context(), ix); err != nil || len(missing) != 0 {
		t.Errorf("missing for amd64: %v, %v", missing, err)
	}
	if missing, err := all.Missing(t.Context(), ix); err != nil || len(missing) != 1 || missing[0].Digest != layers[0].Digest {
		t.Errorf("missing for all: %v, %v", missing, err)
	}
}

// A document that has the type of an index or manifest and can't be read as one is not complete, whatever its
// descriptor says.
func TestMissingOfWhatCallsItselfAManifest(t *testing.T) {
	f := newFixture(t)
	for name, doc := range map[string]string{
		"bad child":  `{"mediaType":"` + v1.MediaTypeImageIndex + `","manifests":[{"digest":"x"}]}`,
		"no array":   `{"MediaType":"` + dockerManifest + `","layers":"x"}`,
		"too many":   `{"mediaType":"` + v1.MediaTypeImageIndex + `","manifests":[` + strings.Repeat(`{},`, maxBlobs) + `{}]}`,
		"no members": `{"mediaType":"` + v1.MediaTypeImageManifest + `"}`,
	} {
		for _, said := range []string{"", "application/json"} {
			d := f.add(said, []byte(doc))
			if missing, err := f.walker("").Missing(t.Context(), d); !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s of type %q: %v, %v", name, said, missing, err)
			}
			if _, err := f.walker("").Missing(t.Context(), f.index(d)); !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s of type %q in an index: %v", name, said, err)
			}
		}
	}
}

func TestWhatIsNoImageIsRefused(t *testing.T) {
	f := newFixture(t)
	config := f.add(v1.MediaTypeImageConfig, []byte(`{"rootfs":{"diff_ids":["sha256:x"]}}`))
	layer := f.add(v1.MediaTypeImageLayer, []byte("layer"))
	for name, doc := range map[string]string{
		"html":           "<!doctype html>",
		"neither":        `{"schemaVersion":2}`,
		"both":           `{"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[],"config":{},"layers":[]}`,
		"schema 1":       `{"schemaVersion":1,"fsLayers":[{"blobSum":"sha256:0"}]}`,
		"bad digest":     `{"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"digest":"sha256:../../etc/passwd","size":1}}`,
		"negative size":  `{"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"digest":"` + string(config.Digest) + `","size":-1}}`,
		"newline":        `{"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"a\nb","digest":"` + string(config.Digest) + `","size":1}}`,
		"diff IDs lack":  `{"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"digest":"` + string(config.Digest) + `","size":1},"layers":[]}`,
		"diff ID is bad": `{"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"digest":"` + string(config.Digest) + `","size":1},"layers":[{"digest":"` + string(layer.Digest) + `","size":5}]}`,
	} {
		d := f.add(v1.MediaTypeImageManifest, []byte(doc))
		if _, err := f.walker("linux/amd64").Layers(t.Context(), d); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	self := f.index(f.index(f.index(f.index(f.index(f.image("amd64", 1))))))
	if _, err := f.walker("linux/amd64").Manifest(t.Context(), self); !errdefs.IsInvalidArgument(err) {
		t.Errorf("indexes nested too deep: %v", err)
	}
	if _, err := f.walker("linux/amd64").Missing(t.Context(), self); !errdefs.IsInvalidArgument(err) {
		t.Errorf("indexes nested too deep for Missing: %v", err)
	}
}

func TestCorruptManifestIsDataLoss(t *testing.T) {
	f := newFixture(t)
	d := f.image("amd64", 1)
	path, err := f.store.Path(d.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-3] ^= 1
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := f.walker("").Manifest(t.Context(), d); !errdefs.IsDataLoss(err) {
		t.Errorf("%v", err)
	}
}

func damage(t *testing.T, path, text string) {
	t.Helper()
	if err := os.Chmod(path, 0o644); err != nil { // blobs are read-only
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestReadDescriptor(t *testing.T) {
	good := `{"mediaType":"a/b","digest":"sha256:` + strings.Repeat("0", 64) + `","size":1}`
	if d, err := ReadDescriptor(strings.NewReader(good)); err != nil || d.Size != 1 {
		t.Errorf("%v, %v", d, err)
	}
	for _, bad := range []string{"", "null", "<html>", `{"digest":"x"}`, strings.Replace(good, `":1`, `":-1`, 1)} {
		if _, err := ReadDescriptor(strings.NewReader(bad)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
