package image

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// dockerImage stores an image with docker's media types. Its documents also have members that distkit does not know.
func (f *fixture) dockerImage(arch string) v1.Descriptor {
	f.t.Helper()
	layer := f.add("application/vnd.docker.image.rootfs.diff.tar.gzip", []byte("layer of "+arch))
	away := v1.Descriptor{MediaType: "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Digest: digest.FromString("away"), Size: 4, URLs: []string{"https://example.org/away"}}
	config := f.add(dockerConfig, []byte(`{"os":"linux","architecture":"`+arch+`","rootfs":{"type":"layers","diff_ids":["`+string(digest.FromString("1"))+`","`+string(digest.FromString("2"))+`"]}}`))
	return f.add(dockerManifest, []byte("{\n   \"schemaVersion\": 2,\n   \"mediaType\": \""+dockerManifest+"\",\n   \"vendor\": {\"note\": \"<kept>\", \"n\": 1e3},\n   \"config\": "+
		f.json(config)+",\n   \"layers\": ["+f.json(layer)+", "+f.json(away)+"]\n}"))
}

func (f *fixture) json(v any) string {
	f.t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		f.t.Fatal(err)
	}
	return string(b)
}

func TestConvert(t *testing.T) {
	f := newFixture(t)
	amd64, arm64 := f.dockerImage("amd64"), f.dockerImage("arm64")
	amd64.Platform, arm64.Platform = &v1.Platform{OS: "linux", Architecture: "amd64"}, &v1.Platform{OS: "linux", Architecture: "arm64"}
	gone := v1.Descriptor{MediaType: dockerManifest, Digest: digest.FromString("gone"), Size: 4, Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}
	list := f.add(dockerManifestList, []byte(`{"schemaVersion":2,"mediaType":"`+dockerManifestList+`","manifests":[`+f.json(amd64)+`,`+f.json(gone)+`,`+f.json(arm64)+`,`+f.json(amd64)+`]}`))
	w := f.walker("")
	d, err := w.Convert(t.Context(), list)
	if err != nil {
		t.Fatal(err)
	}
	if d.MediaType != v1.MediaTypeImageIndex || d.Digest == list.Digest {
		t.Errorf("%+v", d)
	}
	if again, err := w.Convert(t.Context(), list); err != nil || again.Digest != d.Digest {
		t.Errorf("a second time: %+v, %v", again, err)
	}
	if same, err := w.Convert(t.Context(), d); err != nil || same.Digest != d.Digest || same.Size != d.Size {
		t.Errorf("what is converted: %+v, %v", same, err)
	}
	doc, err := w.document(d)
	if err != nil {
		t.Fatal(err)
	}
	if len(doc.Manifests) != 4 || doc.Manifests[1].Digest != gone.Digest || doc.Manifests[1].MediaType != dockerManifest || doc.Manifests[0].Digest != doc.Manifests[3].Digest {
		t.Errorf("manifests %+v", doc.Manifests)
	}
	for i, platform := range map[int]string{0: "linux/amd64", 2: "linux/arm64"} {
		m := doc.Manifests[i]
		if m.MediaType != v1.MediaTypeImageManifest || m.Platform == nil || "linux/"+m.Platform.Architecture != platform {
			t.Errorf("manifest %+v", m)
		}
		b, err := w.read(m)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "docker") || !strings.Contains(string(b), "\n   \"vendor\": {\"note\": \"<kept>\", \"n\": 1e3},\n") {
			t.Errorf("manifest %s", b)
		}
		was, err := f.walker(platform).Layers(t.Context(), list)
		if err != nil {
			t.Fatal(err)
		}
		is, err := f.walker(platform).Layers(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		types := []string{v1.MediaTypeImageLayerGzip, "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"}
		for i := range is {
			if is[i].Digest != was[i].Digest || is[i].Size != was[i].Size || is[i].MediaType != types[i] || len(is[i].URLs) != len(was[i].URLs) {
				t.Errorf("layer %+v, was %+v", is[i], was[i])
			}
		}
		alone, err := f.walker(platform).Convert(t.Context(), list)
		if err != nil || alone.Digest != m.Digest {
			t.Errorf("for %s alone: %+v, %v", platform, alone, err)
		}
	}
}

// A descriptor may embed the document that it describes. If that document is rewritten, the new one is embedded. Other
// embedded documents stay as they are.
func TestConvertEmbeds(t *testing.T) {
	f := newFixture(t)
	m := f.dockerImage("amd64")
	m.Data = f.bytes(m.Digest)
	list := f.add(dockerManifestList, []byte(`{"schemaVersion":2,"manifests":[`+f.json(m)+`]}`))
	d, err := f.walker("").Convert(t.Context(), list)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := f.walker("").document(d)
	if err != nil {
		t.Fatal(err)
	}
	now := doc.Manifests[0]
	if now.Digest == m.Digest || now.Digest != digest.FromBytes(now.Data) || int64(len(now.Data)) != now.Size || !bytes.Equal(now.Data, f.bytes(now.Digest)) {
		t.Errorf("%s embeds %q", now.Digest, now.Data)
	}
}

// A descriptor without a type, or with an unusual one, is followed to its document all the same.
func TestConvertTellsTypesByContent(t *testing.T) {
	f := newFixture(t)
	for _, odd := range []string{"", "text/plain"} {
		m := f.dockerImage("amd64")
		m.MediaType = odd
		ix := f.add("", []byte(`{"schemaVersion":2,"manifests":[`+f.json(m)+`,{"size":`+f.json(m.Size)+`,"digest":"`+string(m.Digest)+`"}]}`))
		d, err := f.walker("").Convert(t.Context(), ix)
		if err != nil {
			t.Fatal(err)
		}
		doc, err := f.walker("").document(d)
		if err != nil {
			t.Fatal(err)
		}
		for _, child := range doc.Manifests {
			if child.MediaType != v1.MediaTypeImageManifest || child.Digest == m.Digest {
				t.Errorf("%q: %+v", odd, child)
			}
		}
	}
}

func TestConvertRefuses(t *testing.T) {
	f := newFixture(t)
	for name, d := range map[string]v1.Descriptor{
		"a blob":    f.add("", []byte("x")),
		"a config":  f.add(v1.MediaTypeImageConfig, []byte(`{"rootfs":{"diff_ids":[]}}`)),
		"not UTF-8": f.add(dockerManifest, []byte(`{"mediaType":"`+dockerManifest+`","config":{"mediaType":"`+dockerConfig+`","digest":"`+string(digest.FromString("x"))+`","size":1},"layers":[],"`+"\xff"+`":1}`)),
	} {
		if _, err := f.walker("").Convert(t.Context(), d); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := f.walker("").Convert(t.Context(), v1.Descriptor{Digest: digest.FromString("gone")}); !errdefs.IsNotFound(err) {
		t.Errorf("gone: %v", err)
	}
}

// A blob that is a layer of one manifest of an index, and itself the next manifest, is handled as both.
func TestAPartMayBeADocumentToo(t *testing.T) {
	f := newFixture(t)
	inner := f.image("amd64", 1)
	layers, err := f.walker("linux/amd64").Layers(t.Context(), inner)
	if err != nil {
		t.Fatal(err)
	}
	config := f.add(v1.MediaTypeEmptyJSON, []byte("{}"))
	outer := f.add(v1.MediaTypeImageManifest, v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: config, Layers: []v1.Descriptor{inner}})
	ix := f.index(outer, inner)
	if err := f.store.Delete(t.Context(), layers[0].Digest); err != nil {
		t.Fatal(err)
	}
	missing, err := f.walker("").Missing(t.Context(), ix)
	if err != nil || len(missing) != 1 || missing[0].Digest != layers[0].Digest {
		t.Errorf("missing %v, %v", missing, err)
	}
}
