package remotes

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A reply to HEAD is never a reason to refuse what GET returns, or to treat an object as missing.
func TestHeadTellsAnotherSize(t *testing.T) {
	ctx := context.Background()
	config := []byte(`{"os":"linux","architecture":"amd64"}`)
	for told, size := range map[string]func(n int) int{
		"less": func(n int) int { return n - 7 }, "more": func(n int) int { return n + 7 }, "1": func(int) int { return 1 }, "nothing": func(int) int { return -1 },
	} {
		f := newFake(t)
		f.blob(config)
		layer := digest.Digest(f.blob([]byte("layer")))
		content := fmt.Appendf(nil, `{"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[]}`,
			ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, digest.FromBytes(config), len(config))
		m := f.manifest("man", ocispec.MediaTypeImageManifest, content)
		f.manifest("idx", ocispec.MediaTypeImageIndex, fmt.Appendf(nil, `{"manifests":[{"mediaType":%q,"digest":%q,"size":%d}]}`, m.MediaType, m.Digest, m.Size))
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			if r.Method != http.MethodHead {
				return false
			}
			reply := httptest.NewRecorder()
			f.serve(reply, r)
			for name, v := range reply.Header() {
				w.Header()[name] = v
			}
			length, err := strconv.Atoi(reply.Header().Get("Content-Length"))
			if w.Header().Del("Content-Length"); err == nil && size(length) >= 0 {
				w.Header().Set("Content-Length", strconv.Itoa(size(length)))
			} else {
				w.Header().Set("Transfer-Encoding", "identity")
			}
			w.WriteHeader(reply.Code)
			return true
		})
		r := open(t, f.host(), Options{})
		for _, tag := range []string{"man", "idx"} {
			if desc, err := ResolvePlatform(ctx, r, tag, "linux/amd64"); err != nil || desc.Digest != m.Digest || desc.Size != m.Size {
				t.Errorf("%s, %s: %+v, %v", told, tag, desc, err)
			}
		}
		hint := fmt.Sprintf("size:%d", len(content))
		for _, hints := range [][]string{{hint, "mediatype:" + m.MediaType}, {"mediatype:" + m.MediaType}, {hint}, nil} {
			pushed, err := r.Push(ctx, m.Digest.String(), bytes.NewReader(content), hints...)
			if err != nil || pushed.State != Exists || pushed.Size != m.Size {
				t.Errorf("%s: push a manifest again, %q: %+v, %v", told, hints, pushed, err)
			}
		}
		for _, hints := range [][]string{{"size:5", "mediatype:application/x"}, {"size:5"}} {
			pushed, err := r.Push(ctx, layer.String(), bytes.NewReader(nil), hints...)
			if err != nil || pushed.State != Exists || pushed.Size != 5 {
				t.Errorf("%s: push a blob again, %q: %+v, %v", told, hints, pushed, err)
			}
		}
		if told == "nothing" {
			if desc, err := r.Resolve(ctx, layer.String()); err != nil || desc.Size != 5 {
				t.Errorf("a blob of which HEAD tells no size: %+v, %v", desc, err)
			}
		}
	}
}

// Storage that a registry redirects to may allow only GET. That says nothing about the registry.
func TestHeadIsRefusedElsewhere(t *testing.T) {
	ctx := context.Background()
	blob := []byte("some bytes")
	for _, status := range []int{401, 403, 405, 501} {
		for _, takesGet := range []bool{true, false} {
			storage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method != http.MethodGet || !takesGet {
					w.WriteHeader(status)
					return
				}
				http.ServeContent(w, r, "", time.Time{}, strings.NewReader(string(blob)))
			}))
			defer storage.Close()
			f := newFake(t)
			id := f.blob(blob)
			f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
				if !strings.HasPrefix(r.URL.Path, "/v2/x/blobs/sha256:") {
					return false
				}
				http.Redirect(w, r, storage.URL+"/"+id, http.StatusTemporaryRedirect)
				return true
			})
			r := open(t, f.host(), Options{})
			want := Stored
			if takesGet {
				want = Exists
				if desc, err := r.Resolve(ctx, id); err != nil || desc.Size != int64(len(blob)) {
					t.Errorf("%d: %+v, %v", status, desc, err)
				}
			} else if _, err := r.Resolve(ctx, id); err == nil || errdefs.IsNotFound(err) {
				t.Errorf("%d: what can't be told is: %v", status, err)
			}
			pushed, err := r.Push(ctx, id, bytes.NewReader(blob), "mediatype:application/x")
			if err != nil || pushed.State != want || pushed.Size != int64(len(blob)) {
				t.Errorf("%d, get %v: %+v, %v", status, takesGet, pushed, err)
			}
			// If the registry itself refuses, that is a refusal.
			f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
				w.WriteHeader(status)
				return true
			})
			if _, err := r.Push(ctx, id, io.LimitReader(bytes.NewReader(blob), 10), "mediatype:application/x"); err == nil {
				t.Errorf("%d of the registry itself: no error", status)
			}
		}
	}
}

// The content of a manifest determines its type, whatever the client that put it or the list says.
func TestTypeByContent(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	f := newFake(t)
	index := []byte(`{"schemaVersion":2,"manifests":[]}`)
	for _, r := range []Remote{&Layout{dir: dir}, open(t, f.host(), Options{}), helper(t, t.TempDir())} {
		for _, said := range []string{"", "mediatype:application/json", "mediatype:application/vnd.oci.image.layer.v1.tar"} {
			if pushed, err := r.Push(ctx, "a", bytes.NewReader(index), said); err != nil || pushed.MediaType != ocispec.MediaTypeImageIndex {
				t.Errorf("%T, %q: %+v, %v", r, said, pushed, err)
			}
			if desc, err := r.Resolve(ctx, "a"); err != nil || desc.MediaType != ocispec.MediaTypeImageIndex {
				t.Errorf("%T, %q: %+v, %v", r, said, desc, err)
			}
		}
		// A document of another kind has the stated type.
		other := []byte(`{"schemaVersion":2,"things":[]}`)
		if pushed, err := r.Push(ctx, "b", bytes.NewReader(other), "mediatype:application/x"); err != nil || pushed.MediaType != "application/x" {
			t.Errorf("%T: %+v, %v", r, pushed, err)
		}
		_, err := r.Push(ctx, "c", bytes.NewReader(other))
		is(t, err, errdefs.IsInvalidArgument)
	}
	// The same in an index.json of another tool.
	for _, said := range []string{``, `"mediaType":"",`, `"mediaType":"application/json",`} {
		d := digest.FromBytes(index)
		content := fmt.Sprintf(`{"schemaVersion":2,"manifests":[{%s"digest":%q,"size":%d,"annotations":{"org.opencontainers.image.ref.name":"a"}},
			{%s"digest":%q,"size":1,"annotations":{"org.opencontainers.image.ref.name":"gone"}}]}`, said, d, len(index), said, digest.FromString("gone"))
		if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		for _, object := range []string{"a", d.String()} {
			if desc, err := (&Layout{dir: dir}).Resolve(ctx, object); err != nil || desc.MediaType != ocispec.MediaTypeImageIndex || desc.Size != int64(len(index)) {
				t.Errorf("%s of %s: %+v, %v", object, said, desc, err)
			}
		}
		if desc, err := (&Layout{dir: dir}).Resolve(ctx, "gone"); err != nil || desc.MediaType == "" {
			t.Errorf("what is not here: %+v, %v", desc, err)
		}
	}
}
