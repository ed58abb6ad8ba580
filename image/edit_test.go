package image

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"distkit/content"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

const someConfig = `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]}}`

// The documents that lead to the edited part have its new digest and size. All else in them stays the same, byte for
// byte.
func TestReplacePart(t *testing.T) {
	ctx := t.Context()
	store := newStore(t)
	w := Walker{Store: store}
	put := func(alg digest.Algorithm, text string) v1.Descriptor {
		t.Helper()
		return v1.Descriptor{Digest: writeAs(t, store, alg, text), Size: int64(len(text))}
	}
	config := put(digest.SHA512, someConfig)
	manifestText := fmt.Sprintf(`{ "x" : [1, 2.0e1],
  "schemaVersion":2, "config":{"mediaType":%q, "data":%q,"digest":"%s",
	"size" : %d , "x":{"digest":"y"}},"layers":[]}`, v1.MediaTypeImageConfig, base64.StdEncoding.EncodeToString([]byte(someConfig)), config.Digest, config.Size)
	manifest := put(digest.SHA256, manifestText)
	entry := func(d v1.Descriptor, platform string) string {
		return fmt.Sprintf(`{"digest":"%s","mediaType":%q , "size":%d,"platform":%s}`, d.Digest, v1.MediaTypeImageManifest, d.Size, platform)
	}
	other := entry(v1.Descriptor{Digest: digest.FromString("other"), Size: 9}, `{"os":"linux","architecture":"arm64"}`)
	// The index lists the manifest twice. The second entry is the one for the platform.
	indexText := `{"schemaVersion":2,"manifests":[` + other + ` , ` + entry(manifest, `{"os":"linux","architecture":"s390x"}`) + ",\n" +
		entry(manifest, `{"os":"linux","architecture":"amd64"}`) + `],"annotations":{"a":"<&>"}}`
	index := put(digest.SHA512, indexText)

	platform, err := ParsePlatform("linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	w.Platform = platform
	part, err := w.ConfigPart(ctx, index)
	if err != nil || part.Digest != config.Digest {
		t.Fatalf("%v, %v", part, err)
	}
	newConfig := strings.Replace(someConfig, "amd64", "amd64\",\"author\":\"me", 1)
	root, err := part.Replace(ctx, []byte(newConfig))
	if err != nil {
		t.Fatal(err)
	}
	read := func(d v1.Descriptor) string {
		t.Helper()
		b, err := w.read(d)
		if err != nil {
			t.Fatal(err)
		}
		if int64(len(b)) != d.Size {
			t.Errorf("%s has %d bytes, not %d", d.Digest, len(b), d.Size)
		}
		return string(b)
	}
	wantManifest := strings.NewReplacer(string(config.Digest), string(digest.SHA512.FromString(newConfig)), fmt.Sprintf(`"size" : %d `, config.Size), fmt.Sprintf(`"size" : %d `, len(newConfig)),
		base64.StdEncoding.EncodeToString([]byte(someConfig)), base64.StdEncoding.EncodeToString([]byte(newConfig))).Replace(manifestText)
	at := strings.LastIndex(indexText, string(manifest.Digest))
	wantIndex := indexText[:at] + strings.NewReplacer(string(manifest.Digest), string(digest.FromString(wantManifest)), fmt.Sprintf(`"size":%d`, manifest.Size), fmt.Sprintf(`"size":%d`, len(wantManifest))).Replace(indexText[at:])
	if got := read(root); got != wantIndex || root.Digest != digest.SHA512.FromString(wantIndex) || root.MediaType != v1.MediaTypeImageIndex {
		t.Errorf("index\n%s, want\n%s\n%v", got, wantIndex, root)
	}
	m, err := w.Manifest(ctx, root)
	if err != nil {
		t.Fatal(err)
	}
	if got := read(m); got != wantManifest {
		t.Errorf("manifest\n%s, want\n%s", got, wantManifest)
	}
	if b, err := w.Config(ctx, root); err != nil || string(b) != newConfig {
		t.Errorf("config %s, %v", b, err)
	}
	if got := read(index); got != indexText {
		t.Errorf("the old index is %s", got)
	}

	// After an edit a manifest is still a manifest, and a config can still be used.
	for _, bad := range []string{"", "{}", indexText, someConfig} {
		part, err := w.ManifestPart(ctx, index)
		if err == nil {
			_, err = part.Replace(ctx, []byte(bad))
		}
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("as manifest: %.40s: %v", bad, err)
		}
	}
	for _, bad := range []string{"", "{}", manifestText, strings.Repeat(" ", MaxDocument) + someConfig} {
		if _, err := part.Replace(ctx, []byte(bad)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("as config: %.40s: %v", bad, err)
		}
	}
}

// If a document has a member twice, readers differ in which one they use. Such a document is not rewritten.
func TestAmbiguousDocumentsAreNotRewritten(t *testing.T) {
	ctx := t.Context()
	store := newStore(t)
	config := writeAs(t, store, digest.SHA256, someConfig)
	d := fmt.Sprintf(`"digest":"%s","size":%d`, config, len(someConfig))
	for _, text := range []string{
		`{"config":{` + d + `},"config":{` + d + `}}`,
		`{"config":{` + d + `},"Config":{` + d + `}}`,
		`{"config":{"digest":"` + string(config) + `"}}`,
		`{"config":{` + d + `,"\u017fize":7}}`,
		`{"con\u017fig":{` + d + `}}`,
	} {
		w := Walker{Store: store}
		b := strings.Replace(text, "{", `{"schemaVersion":2,"mediaType":"`+v1.MediaTypeImageManifest+`","layers":[],`, 1)
		if !json.Valid([]byte(b)) {
			t.Fatal(b)
		}
		part, err := w.ConfigPart(ctx, v1.Descriptor{Digest: writeAs(t, store, digest.SHA256, b)})
		if err == nil {
			_, err = part.Replace(ctx, []byte(someConfig+"\n"))
		}
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func newStore(t *testing.T) *content.Store {
	t.Helper()
	s, err := content.Open(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// writeAs stores a blob under a digest of the algorithm.
func writeAs(t *testing.T, s *content.Store, alg digest.Algorithm, text string) digest.Digest {
	t.Helper()
	dgst := alg.FromString(text)
	if _, err := content.WriteBlob(t.Context(), s, string(dgst), strings.NewReader(text), int64(len(text)), dgst); err != nil {
		t.Fatal(err)
	}
	return dgst
}

// A config with more members than any config needs is refused before they are decoded, which would take many times its
// size.
func TestConfigsAreBounded(t *testing.T) {
	b := strings.Replace(someConfig, "[]", "["+strings.Repeat(`"",`, 1<<20)+`""]`, 1)
	if err := Validate([]byte(b)); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "members") {
		t.Errorf("%v", err)
	}
}
