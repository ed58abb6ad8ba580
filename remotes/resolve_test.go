package remotes

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestResolve(t *testing.T) {
	f := newFake(t)
	want := f.manifest("latest", ocispec.MediaTypeImageIndex, []byte(`{"schemaVersion":2,"manifests":[]}`))
	blob := f.blob(noise(77))
	get := func(mediaType string, digests bool) func(http.ResponseWriter, *http.Request, int) bool {
		return func(w http.ResponseWriter, r *http.Request, n int) bool {
			w.Header().Set("Content-Type", mediaType)
			if digests {
				w.Header().Set("Docker-Content-Digest", want.Digest.String())
			}
			w.Write(f.manifests["latest"].content)
			return true
		}
	}
	refuse := func(status int) func(http.ResponseWriter, *http.Request, int) bool {
		return func(w http.ResponseWriter, r *http.Request, n int) bool {
			if r.Method == http.MethodHead {
				w.WriteHeader(status)
			}
			return r.Method == http.MethodHead
		}
	}
	for name, c := range map[string]struct {
		fault func(http.ResponseWriter, *http.Request, int) bool
		asked []string
	}{
		"head":                {nil, []string{"HEAD"}},
		"no digest":           {get(ocispec.MediaTypeImageIndex, false), []string{"HEAD", "GET"}},
		"type only in body":   {get("application/json", true), []string{"HEAD", "GET"}},
		"type with parameter": {get(ocispec.MediaTypeImageIndex+"; charset=utf-8", true), []string{"HEAD"}},
		"head not allowed":    {refuse(http.StatusMethodNotAllowed), []string{"HEAD", "GET"}},
		"head not understood": {refuse(http.StatusBadRequest), []string{"HEAD", "GET"}},
	} {
		f.reply(c.fault)
		got, err := open(t, f.host(), Options{}).Resolve(context.Background(), "latest")
		if err != nil || got.Digest != want.Digest || got.Size != want.Size || got.MediaType != want.MediaType {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		var asked []string
		for _, s := range f.seen() {
			method, _, _ := strings.Cut(s, " ")
			asked = append(asked, method)
		}
		if !slices.Equal(asked, c.asked) {
			t.Errorf("%s: asked %q", name, asked)
		}
		for _, mediaType := range manifestTypes {
			if h := f.request(0).Header; len(h["Accept"]) != 1 || !strings.Contains(h.Get("Accept"), mediaType) {
				t.Errorf("%s: accept %q", name, h["Accept"])
			}
		}
	}
	f.reply(nil)
	r := open(t, f.host(), Options{})
	got, err := r.Resolve(context.Background(), want.Digest.String())
	if err != nil || got.Digest != want.Digest || got.MediaType != want.MediaType {
		t.Errorf("digest: %+v, %v", got, err)
	}
	got, err = r.Resolve(context.Background(), blob)
	if err != nil || got.Digest.String() != blob || got.Size != 77 || got.MediaType != mediaTypeOctets {
		t.Errorf("blob: %+v, %v", got, err)
	}
	for _, id := range []string{"nope", digest.FromString("nope").String()} {
		_, err = r.Resolve(context.Background(), id)
		is(t, err, errdefs.IsNotFound)
	}
	// If the reply has a body, the digest in the header is compared with it.
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if r.Method == http.MethodHead {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return true
		}
		return get(ocispec.MediaTypeImageIndex, true)(w, r, n)
	})
	want.Digest = digest.FromString("a lie")
	_, err = r.Resolve(context.Background(), "latest")
	is(t, err, errdefs.IsDataLoss)

	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		w.Header().Set("Content-Type", "application/vnd.docker.distribution.manifest.v1+prettyjws")
		return true
	})
	_, err = r.Resolve(context.Background(), "latest")
	is(t, err, errdefs.IsNotImplemented)
}

// image adds a manifest with a config for the platform, and returns its descriptor.
func (f *fake) image(tag, platform string) ocispec.Descriptor {
	os, arch, _ := strings.Cut(platform, "/")
	arch, variant, _ := strings.Cut(arch, "/")
	config := fmt.Sprintf(`{"os":%q,"architecture":%q,"variant":%q}`, os, arch, variant)
	id := f.blob([]byte(config))
	return f.manifest(tag, ocispec.MediaTypeImageManifest, fmt.Appendf(nil,
		`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[],"annotations":{"for":%q}}`,
		ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, id, len(config), platform))
}

// index adds an index of the descriptors, and returns its descriptor.
func (f *fake) index(tag string, list ...ocispec.Descriptor) ocispec.Descriptor {
	b, _ := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: list})
	return f.manifest(tag, ocispec.MediaTypeImageIndex, b)
}

func with(d ocispec.Descriptor, platform string) ocispec.Descriptor {
	os, arch, _ := strings.Cut(platform, "/")
	arch, variant, _ := strings.Cut(arch, "/")
	d.Platform = &ocispec.Platform{OS: os, Architecture: arch, Variant: variant}
	return d
}

func TestResolvePlatform(t *testing.T) {
	f := newFake(t)
	images := map[string]ocispec.Descriptor{}
	for _, p := range []string{"linux/amd64", "linux/386", "linux/arm64", "linux/arm/v6", "linux/arm/v7", "windows/amd64", "linux/s390x"} {
		images[p] = f.image("", p)
	}
	attestation := with(f.manifest("", ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"config":{},"layers":[]}`)), "unknown/unknown")
	f.index("all", attestation, with(images["linux/386"], "linux/386"), with(images["linux/arm/v6"], "linux/arm/v6"), with(images["linux/arm/v7"], "linux/arm/v7"),
		with(images["linux/arm64"], "linux/arm64/v8"), with(images["linux/amd64"], "linux/amd64"), with(images["windows/amd64"], "windows/amd64"))
	f.index("nested", with(images["linux/386"], "linux/386"), f.index("", f.index("", with(images["linux/amd64"], "linux/amd64"))))
	f.index("bare", images["linux/arm64"], images["linux/amd64"], attestation)
	f.image("single", "linux/amd64")
	artifact := f.manifest("artifact", ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"config":{"mediaType":"application/x"},"layers":[]}`))
	unsaid := f.image("unsaid", "/")
	f.image("half", "/arm64")
	f.index("artifacts", artifact, unsaid)
	images["linux/"+runtime.GOARCH] = f.image("here", "linux/"+runtime.GOARCH)
	r := open(t, f.host(), Options{})
	for _, c := range []struct{ tag, platform, want string }{
		{"all", "linux/amd64", "linux/amd64"},
		{"all", "linux/x86_64", "linux/amd64"},
		{"all", "linux/386", "linux/386"},
		{"all", "linux/arm64", "linux/arm64"},
		{"all", "linux/arm", "linux/arm/v7"},
		{"all", "linux/arm/v6", "linux/arm/v6"},
		{"all", "linux/arm/v8", "linux/arm/v7"},
		{"all", "windows/amd64", "windows/amd64"},
		{"nested", "linux/amd64", "linux/amd64"},
		{"nested", "linux/386", "linux/386"},
		{"bare", "linux/amd64", "linux/amd64"},
		{"single", "linux/amd64", "linux/amd64"},
	} {
		got, err := ResolvePlatform(context.Background(), r, c.tag, c.platform)
		if err != nil || got.Digest != images[c.want].Digest || got.Platform == nil {
			t.Errorf("%s for %s: %+v, %v", c.tag, c.platform, got, err)
		}
	}
	// A manifest without a platform does not match another platform.
	for tag, want := range map[string]ocispec.Descriptor{"artifact": artifact, "unsaid": unsaid} {
		got, err := ResolvePlatform(context.Background(), r, tag, "linux/amd64")
		if err != nil || got.Digest != want.Digest || got.Platform != nil {
			t.Errorf("%s: %+v, %v", tag, got, err)
		}
	}
	if got, err := ResolvePlatform(context.Background(), r, "here", "local"); err != nil || got.Digest != images["linux/"+runtime.GOARCH].Digest {
		t.Errorf("local: %+v, %v", got, err)
	}
	for _, c := range []struct{ tag, platform, say string }{
		{"all", "linux/s390x", "linux/386, linux/arm/v6, linux/arm/v7, linux/arm64, linux/amd64, windows/amd64"},
		{"single", "linux/arm64", "linux/amd64"},
		{"bare", "windows/amd64", "linux/arm64, linux/amd64"},
		{"half", "linux/amd64", "arm64"},
		{"artifacts", "linux/amd64", "none"},
		{f.blob(noise(5)), "linux/amd64", "not a manifest"},
	} {
		_, err := ResolvePlatform(context.Background(), r, c.tag, c.platform)
		is(t, err, errdefs.IsNotFound)
		if !strings.Contains(err.Error(), c.say) || strings.Contains(err.Error(), "unknown") {
			t.Errorf("%s for %s: %v does not say %q", c.tag, c.platform, err, c.say)
		}
	}
	for _, p := range []string{"", "x", "linux/amd64/v1/x", "linux/*"} {
		_, err := ResolvePlatform(context.Background(), r, "all", p)
		is(t, err, errdefs.IsInvalidArgument)
	}
}

// An index may have children whose digests can't be verified here. The others can be resolved.
func TestResolvePlatformUnknownAlgorithm(t *testing.T) {
	f := newFake(t)
	m := f.image("", "linux/amd64")
	unknown := map[string]string{
		"blake3": "blake3:" + strings.Repeat("ab", 32), "md5": "md5:" + strings.Repeat("ab", 16), "+": "sha256+b64u:LCa0a2j_xo_5m0U8HTBBNBNCLXBkg7-g-YpeiGJm564",
	}
	odd := func(d, platform string) ocispec.Descriptor {
		desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.Digest(d), Size: 500}
		if platform != "" {
			desc = with(desc, platform)
		}
		return desc
	}
	r := open(t, f.host(), Options{})
	for name, d := range unknown {
		for _, platform := range []string{"linux/arm64", "linux/amd64", "unknown/unknown", ""} {
			for i, children := range [][]ocispec.Descriptor{{odd(d, platform), with(m, "linux/amd64")}, {m, odd(d, platform)}} {
				f.index("t", children...)
				if got, err := ResolvePlatform(context.Background(), r, "t", "linux/amd64"); err != nil || got.Digest != m.Digest {
					t.Errorf("%s for %q, %d: %+v, %v", name, platform, i, got, err)
				}
			}
		}
		// If nothing else fits, the error does not say that there is none.
		f.index("t", odd(d, "linux/s390x"), with(m, "linux/amd64"))
		_, err := ResolvePlatform(context.Background(), r, "t", "linux/s390x")
		is(t, err, errdefs.IsNotImplemented)
		if !strings.Contains(err.Error(), d) {
			t.Error(err)
		}
		_, err = ResolvePlatform(context.Background(), r, "t", "linux/riscv64")
		is(t, err, errdefs.IsNotFound)
	}
	// Text that is not a digest is damage.
	for _, d := range []string{"", "sha256", "sha256:", "sha256:" + strings.Repeat("AB", 32), "sha256:ab", "../x:y"} {
		f.index("t", odd(d, "linux/arm64"), with(m, "linux/amd64"))
		_, err := ResolvePlatform(context.Background(), r, "t", "linux/amd64")
		is(t, err, errdefs.IsDataLoss)
	}
}

func TestResolvePlatformBounds(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	// A chain of a hundred indexes, and a thousand indexes in one.
	deep := f.index("")
	for range 100 {
		deep = f.index("deep", deep)
	}
	var wide []ocispec.Descriptor
	for i := range 1000 {
		wide = append(wide, f.manifest("", ocispec.MediaTypeImageIndex, fmt.Appendf(nil, `{"schemaVersion":2,"manifests":[],"annotations":{"n":"%d"}}`, i)))
	}
	f.index("wide", wide...)
	// An index with a hundred thousand entries.
	var many []ocispec.Descriptor
	for i := range 50000 {
		many = append(many, with(ocispec.Descriptor{MediaType: "a/b", Digest: deep.Digest}, fmt.Sprintf("linux/\x1b%d", i)))
	}
	f.index("many", many...)
	f.index("liar", ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: "sha256:../../x"})
	f.index("huge", ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: deep.Digest, Size: 1 << 40})
	r := open(t, f.host(), Options{})
	for tag, class := range map[string]func(error) bool{
		"deep": errdefs.IsDataLoss, "wide": errdefs.IsNotImplemented, "many": errdefs.IsNotFound, "liar": errdefs.IsDataLoss, "huge": errdefs.IsDataLoss,
	} {
		f.reset()
		_, err := ResolvePlatform(context.Background(), r, tag, "linux/amd64")
		is(t, err, class)
		if n := f.count(); n > 2*maxWalk {
			t.Errorf("%s: %d requests", tag, n)
		}
	}
}

// Docker-Content-Digest is only a hint. Text that is not a digest, or has an unknown algorithm, is ignored. If an
// object is requested by its digest, its bytes are verified.
func TestContentDigestHint(t *testing.T) {
	content := []byte(`{"schemaVersion":2,"layers":[]}`)
	right := digest.FromBytes(content)
	header := ""
	f := newFake(t)
	f.manifest("latest", ocispec.MediaTypeImageManifest, content)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if !strings.HasPrefix(r.URL.Path, "/v2/x/manifests/") {
			return false
		}
		if r.Method == http.MethodPut {
			io.Copy(io.Discard, r.Body)
			w.Header().Set("Docker-Content-Digest", header)
			w.WriteHeader(http.StatusCreated)
			return true
		}
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		w.Header().Set("Content-Length", strconv.Itoa(len(content)))
		w.Header().Set("Docker-Content-Digest", header)
		if r.Method == http.MethodGet {
			w.Write(content)
		}
		return true
	})
	hex := right.Encoded()
	other := digest.FromString("something else").String()
	for _, header = range []string{"", "garbage", ":", hex, `"` + right.String() + `"`, "SHA256:" + hex, "sha256:" + strings.ToUpper(hex),
		"sha256:" + hex[:60], "blake3:" + hex, "md5:" + hex[:32], " ", "sha256:", digest.SHA512.FromBytes(content).String(), right.String(), other} {
		r := open(t, f.host(), Options{})
		for _, object := range []string{"latest", right.String()} {
			desc, err := r.Resolve(context.Background(), object)
			wrong := header == other && object == "latest"
			if !wrong && (err != nil || desc.Digest.Validate() != nil || desc.Digest.Algorithm().FromBytes(content) != desc.Digest) {
				t.Errorf("%q: %s resolves to %+v, %v", header, object, desc, err)
			}
			got, err := fetch(t, r, object)
			if wrong {
				is(t, err, errdefs.IsDataLoss)
			} else if err != nil || string(got) != string(content) {
				t.Errorf("%q: fetch %s: %v", header, object, err)
			}
		}
		_, err := r.Push(context.Background(), "other", bytes.NewReader(content))
		if header == other {
			is(t, err, errdefs.IsDataLoss)
		} else if err != nil {
			t.Errorf("%q: put: %v", header, err)
		}
	}
}
