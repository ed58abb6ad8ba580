package serve

import (
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestDelete(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	s.Writable, s.Deletable = true, true
	f := start(t, s, 10)
	d := f.image("layer", "x:1", "x:2", "y:1")
	layer := string(digest.FromString("layer"))

	f.want(f.do("DELETE", "/v2/x/manifests/3", ""), 404, codeManifestUnknown)
	f.want(f.do("DELETE", "/v2/x/manifests/1", ""), 202, "")
	f.want(f.do("GET", "/v2/x/manifests/1", ""), 404, codeManifestUnknown)
	f.want(f.do("GET", "/v2/x/manifests/2", ""), 200, "")
	f.want(f.do("DELETE", "/v2/x/blobs/"+layer, ""), 405, codeDenied)

	// The tag of another repository keeps the manifest.
	f.want(f.do("DELETE", "/v2/x/manifests/"+string(d.Digest), ""), 202, "")
	f.want(f.do("GET", "/v2/x/manifests/2", ""), 404, codeManifestUnknown)
	f.want(f.do("GET", "/v2/y/manifests/1", ""), 200, "")
	f.want(f.do("DELETE", "/v2/x/manifests/"+string(d.Digest), ""), 405, codeDenied)
	f.want(f.do("DELETE", "/v2/y/manifests/"+string(d.Digest), ""), 202, "")
	f.want(f.do("GET", "/v2/y/manifests/"+string(d.Digest), ""), 404, codeManifestUnknown)
	f.want(f.do("DELETE", "/v2/y/manifests/"+string(d.Digest), ""), 404, codeManifestUnknown)

	f.want(f.do("DELETE", "/v2/x/manifests/"+layer, ""), 404, codeManifestUnknown)
	f.want(f.do("DELETE", "/v2/x/blobs/"+layer, ""), 202, "")
	f.want(f.do("GET", "/v2/x/blobs/"+layer, ""), 404, codeBlobUnknown)
	f.want(f.do("DELETE", "/v2/x/blobs/"+layer, ""), 404, codeBlobUnknown)
}

func TestDeletedReferrerIsNotListed(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	s.Writable, s.Deletable = true, true
	f := start(t, s, 10)
	subject := f.image("x", "x:1")
	m := manifest(t, &subject, "a/sbom", nil)
	path := "/v2/x/manifests/" + string(digest.FromString(m))
	f.want(f.do("PUT", path, m, "Content-Type", v1.MediaTypeImageManifest), 201, "")
	list, err := s.referrersOf(t.Context(), subject.Digest)
	if err != nil || len(list) != 1 {
		t.Fatalf("referrers %v, %v", list, err)
	}
	f.want(f.do("DELETE", path, ""), 202, "")
	if list, err := s.referrersOf(t.Context(), subject.Digest); err != nil || len(list) != 0 {
		t.Errorf("referrers %v, %v", list, err)
	}
	f.want(f.do("GET", path, ""), 404, codeManifestUnknown)
}

// A sweep must not wait for the hold of a push in the same process.
func TestDeletesAndPushesAtTheSameTime(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	s.Writable, s.Deletable = true, true
	f := start(t, s, 20)
	f.blob("{}")
	layer := f.blob("layer")
	var group sync.WaitGroup
	for w := range 4 {
		group.Go(func() {
			for i := range 20 {
				m := manifest(t, nil, "", map[string]string{"of": fmt.Sprint(w, i)}, layer)
				f.want(f.do("PUT", fmt.Sprintf("/v2/x/manifests/%d", w), m), 201, "")
			}
		})
		group.Go(func() {
			for i := range 5 {
				d := f.blob(fmt.Sprint("blob", w, i))
				f.want(f.do("DELETE", "/v2/x/blobs/"+string(d.Digest), ""), 202, "")
			}
		})
	}
	group.Wait()
}

// A referrer that was pushed by its digest stays a referrer, whatever happens to a tag of it.
func TestReferrerOutlivesItsTag(t *testing.T) {
	t.Parallel()
	f := writable(t)
	subject := f.image("x", "x:1")
	m := manifest(t, &subject, "a/sbom", nil)
	d := digest.FromString(m)
	for _, object := range []string{"sbom", string(d)} {
		f.want(f.do("PUT", "/v2/x/manifests/"+object, m), 201, "")
	}
	f.want(f.do("PUT", "/v2/x/manifests/sbom", manifest(t, &subject, "b/other", nil)), 201, "")
	list, err := f.referrersOf(t.Context(), subject.Digest)
	if err != nil || !slices.ContainsFunc(list, func(r v1.Descriptor) bool { return r.Digest == d }) {
		t.Errorf("referrers %v, %v", list, err)
	}
}

// A referrer whose document was missing is listed again after it is pushed again. Its entry is still in the index.
func TestReferrerThatComesBack(t *testing.T) {
	t.Parallel()
	f := writable(t)
	subject := f.image("x", "x:1")
	m := manifest(t, &subject, "a/sbom", nil)
	d := digest.FromString(m)
	count := func(want int) {
		t.Helper()
		if list, err := f.referrersOf(t.Context(), subject.Digest); err != nil || len(list) != want {
			t.Errorf("%d referrers, not %d: %v", len(list), want, err)
		}
	}
	f.want(f.do("PUT", "/v2/x/manifests/"+string(d), m), 201, "")
	if err := f.Store.Delete(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	count(0)
	f.want(f.do("PUT", "/v2/x/manifests/"+string(d), m), 201, "")
	count(1)
}
