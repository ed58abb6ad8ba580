package remotes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// artifact is a manifest with a subject.
func artifact(subject digest.Digest, n int) (content []byte, id digest.Digest) {
	content = fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"artifactType":"a/b","config":{},"layers":[],"subject":{"digest":%q},"annotations":{"n":"%d"}}`,
		ocispec.MediaTypeImageManifest, subject, n)
	return content, digest.FromBytes(content)
}

func putArtifact(t *testing.T, r Remote, subject digest.Digest, n int) (digest.Digest, Pushed, error) {
	t.Helper()
	content, id := artifact(subject, n)
	pushed, err := r.Push(context.Background(), id.String(), bytes.NewReader(content), "mediatype:"+ocispec.MediaTypeImageManifest)
	return id, pushed, err
}

func referrersOf(r Remote, subject digest.Digest) (list []digest.Digest, err error) {
	for desc, err := range r.Referrers(context.Background(), subject, ReferrerFilter{}) {
		if err != nil {
			return list, err
		}
		list = append(list, desc.Digest)
	}
	return list, nil
}

// listed reads the list under a tag from the fake.
func (f *fake) listed(t *testing.T, tag string) (list []digest.Digest) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	var index ocispec.Index
	if e, ok := f.manifests[tag]; ok {
		if err := json.Unmarshal(e.content, &index); err != nil || !isIndex(e.mediaType) {
			t.Fatalf("%s: %s %s", tag, e.mediaType, e.content)
		}
	}
	for _, m := range index.Manifests {
		list = append(list, m.Digest)
	}
	return list
}

// If the process that put a referrer died before it listed it, the referrer is listed when it is put again.
func TestLinkThatFailedOnceIsMade(t *testing.T) {
	subject := digest.FromString("subject")
	tag := "sha256-" + subject.Encoded()
	f := newFake(t)
	r := open(t, f.host(), Options{})
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if r.Method != http.MethodPut || !strings.HasSuffix(r.URL.Path, tag) {
			return false
		}
		w.WriteHeader(http.StatusInternalServerError)
		return true
	})
	id, _, err := putArtifact(t, r, subject, 1)
	is(t, err, errdefs.IsAborted)
	f.reply(nil)
	for _, hint := range []string{"mediatype:" + ocispec.MediaTypeImageManifest, "x:y"} {
		f.mu.Lock()
		delete(f.manifests, tag)
		f.mu.Unlock()
		content, _ := artifact(subject, 1)
		pushed, err := r.Push(context.Background(), id.String(), bytes.NewReader(content), hint)
		if err != nil || pushed.State != Exists {
			t.Errorf("%+v, %v", pushed, err)
		}
		if got := f.listed(t, tag); !slices.Equal(got, []digest.Digest{id}) {
			t.Errorf("%s: listed are %v", hint, got)
		}
	}
}

// When several referrers are put at the same time, none is lost. Either a lock between the processes of one user
// prevents that, or the registry's comparison.
func TestReferrersPutAtOnce(t *testing.T) {
	for _, how := range []string{"lock", "entity tags"} {
		if t.Setenv("XDG_RUNTIME_DIR", ""); how == "lock" {
			runtimeDir(t)
		}
		subject := digest.FromString("subject")
		tag := "sha256-" + subject.Encoded()
		f := newFake(t)
		// Unless something prevents it, all processes read the list before any of them has changed it.
		const writers = 6
		var reading sync.WaitGroup
		reading.Add(writers)
		var once sync.Map
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			if !strings.HasSuffix(r.URL.Path, tag) || how == "lock" {
				return false
			}
			f.mu.Lock()
			_, exists := f.manifests[tag]
			f.mu.Unlock()
			if r.Method == http.MethodGet && exists {
				defer func() {
					f.mu.Lock()
					defer f.mu.Unlock()
					w.Header().Set("ETag", fmt.Sprintf("%q", digest.FromBytes(f.manifests[tag].content)))
					w.Header().Set("Content-Type", f.manifests[tag].mediaType)
					w.Write(f.manifests[tag].content)
				}()
				if _, seen := once.LoadOrStore(r.RemoteAddr, true); !seen {
					reading.Done()
					reading.Wait()
				}
				return true
			}
			if want := r.Header.Get("If-Match"); r.Method == http.MethodPut && want != "" {
				f.mu.Lock()
				defer f.mu.Unlock()
				if current := fmt.Sprintf("%q", digest.FromBytes(f.manifests[tag].content)); want != current {
					w.WriteHeader(http.StatusPreconditionFailed)
					return true
				}
				var b bytes.Buffer
				b.ReadFrom(r.Body)
				f.manifests[tag] = entry{r.Header.Get("Content-Type"), b.Bytes()}
				w.WriteHeader(http.StatusCreated)
				return true
			}
			return false
		})
		var want []digest.Digest
		if how != "lock" {
			f.manifest(tag, ocispec.MediaTypeImageIndex, []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`))
		}
		var wg sync.WaitGroup
		for n := range writers {
			_, id := artifact(subject, n)
			want = append(want, id)
			r := open(t, f.host(), Options{})
			wg.Go(func() {
				if _, _, err := putArtifact(t, r, subject, n); err != nil {
					t.Errorf("%s: %v", how, err)
				}
			})
		}
		wg.Wait()
		got := f.listed(t, tag)
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s: listed are %d of %d", how, len(got), len(want))
		}
	}
}

// A list that another client has overwritten is put again. A registry that compares with another digest than it states
// is not asked to compare.
func TestReferrersAreReadAgain(t *testing.T) {
	subject := digest.FromString("subject")
	tag := "sha256-" + subject.Encoded()
	other := `{"schemaVersion":2,"manifests":[{"mediaType":"a/b","digest":"` + subject.String() + `","size":1,"kept":"so"}],"kept":{"so":"too"}}`
	for _, how := range []string{"overwritten", "wrong entity tag"} {
		f := newFake(t)
		puts := 0
		f.manifest(tag, ocispec.MediaTypeImageIndex, []byte(other))
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			if !strings.HasSuffix(r.URL.Path, tag) {
				return false
			}
			if how == "wrong entity tag" {
				w.Header().Set("ETag", `"something"`)
				if r.Header.Get("If-Match") != "" {
					w.WriteHeader(http.StatusPreconditionFailed)
					return true
				}
				return false
			}
			if r.Method != http.MethodPut || puts > 0 {
				return false
			}
			puts++
			w.WriteHeader(http.StatusCreated) // and then it has the other client's list
			return true
		})
		id, _, err := putArtifact(t, open(t, f.host(), Options{}), subject, 1)
		if got := f.listed(t, tag); err != nil || !slices.Equal(got, []digest.Digest{subject, id}) {
			t.Errorf("%s: %v, %v", how, got, err)
		}
		if b := string(f.manifests[tag].content); !strings.Contains(b, `"kept":"so"`) || !strings.Contains(b, `"kept":{"so":"too"}`) {
			t.Errorf("what others wrote is lost: %s", b)
		}
	}
}

// A deleted referrer is removed from the list. So is one that makes the registry refuse the list.
func TestDeletedReferrers(t *testing.T) {
	ctx := context.Background()
	subject := digest.FromString("subject")
	tag := "sha256-" + subject.Encoded()
	f := newFake(t)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		id := strings.TrimPrefix(r.URL.Path, "/v2/x/manifests/")
		f.mu.Lock()
		defer f.mu.Unlock()
		switch {
		case r.Method == http.MethodDelete:
			if _, ok := f.manifests[id]; !ok {
				return false
			}
			delete(f.manifests, id)
			w.WriteHeader(http.StatusAccepted)
			return true
		case r.Method == http.MethodPut && id == tag:
			var b bytes.Buffer
			b.ReadFrom(r.Body)
			var index ocispec.Index
			json.Unmarshal(b.Bytes(), &index)
			for _, m := range index.Manifests {
				if _, ok := f.manifests[m.Digest.String()]; !ok {
					w.WriteHeader(http.StatusBadRequest)
					fmt.Fprint(w, `{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN"}]}`)
					return true
				}
			}
			f.manifests[tag] = entry{r.Header.Get("Content-Type"), b.Bytes()}
			w.WriteHeader(http.StatusCreated)
			return true
		}
		return false
	})
	r := open(t, f.host(), Options{})
	var ids []digest.Digest
	for n := range 3 {
		id, _, err := putArtifact(t, r, subject, n)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	if err := r.Delete(ctx, ids[0].String()); err != nil {
		t.Fatal(err)
	}
	if got, err := referrersOf(r, subject); err != nil || !slices.Equal(got, ids[1:]) {
		t.Errorf("after the deletion: %v, %v", got, err)
	}
	// Another client has deleted a referrer, and has not changed the list.
	f.mu.Lock()
	delete(f.manifests, ids[1].String())
	f.mu.Unlock()
	id, _, err := putArtifact(t, r, subject, 3)
	if got := f.listed(t, tag); err != nil || !slices.Equal(got, []digest.Digest{ids[2], id}) {
		t.Errorf("after another's deletion: %v, %v", got, err)
	}
	is(t, r.Delete(ctx, ids[0].String()), errdefs.IsNotFound)
}

// Only the reply of the last host can mean that there are none.
func TestReferrersOfAMirror(t *testing.T) {
	subject := digest.FromString("subject")
	for _, how := range []string{"no API", "an empty list", "down"} {
		mirror, upstream := newFake(t), newFake(t)
		id, _, err := putArtifact(t, open(t, upstream.host(), Options{}), subject, 1)
		if err != nil {
			t.Fatal(err)
		}
		mirror.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			switch {
			case how == "down":
				w.WriteHeader(http.StatusServiceUnavailable)
			case how == "an empty list" && strings.Contains(r.URL.Path, "/referrers/"):
				w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
				fmt.Fprint(w, `{"schemaVersion":2,"manifests":[]}`)
			default:
				return false
			}
			return true
		})
		hosts := t.TempDir()
		writeHosts(t, hosts, "registry.test", fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", "http://"+upstream.host(), "http://"+mirror.host()))
		r := open(t, "registry.test", Options{HostsDir: hosts})
		if got, err := referrersOf(r, subject); err != nil || !slices.Equal(got, []digest.Digest{id}) {
			t.Errorf("%s: %v, %v", how, got, err)
		}
		if got, err := referrersOf(r, digest.FromString("none")); err != nil || len(got) > 0 {
			t.Errorf("%s: of none %v, %v", how, got, err)
		}
		upstream.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			w.WriteHeader(http.StatusForbidden)
			return true
		})
		_, err = referrersOf(r, subject)
		is(t, err, errdefs.IsPermissionDenied)
	}
}

// An object that is not a list of referrers is not used as one, and nothing is added to it.
func TestNoListOfReferrers(t *testing.T) {
	index := func(m ...ocispec.Descriptor) []byte {
		b, _ := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: m})
		return b
	}
	platform := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("amd64"), Size: 5}
	subject := digest.FromBytes(index(platform))
	tag := "sha256-" + subject.Encoded()
	// A registry that resolves the tag to the digest. The subject's own manifests are not referrers.
	f := newFake(t)
	f.manifest(tag, ocispec.MediaTypeImageIndex, index(platform))
	r := open(t, f.host(), Options{})
	if got, err := referrersOf(r, subject); err != nil || len(got) > 0 {
		t.Errorf("%v, %v", got, err)
	}
	id, _, err := putArtifact(t, r, subject, 1)
	if got := f.listed(t, tag); err != nil || !slices.Equal(got, []digest.Digest{id}) {
		t.Errorf("%v, %v", got, err)
	}
	// The tag has another object.
	f.manifest(tag, ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	_, err = referrersOf(r, subject)
	is(t, err, errdefs.IsDataLoss)
	_, _, err = putArtifact(t, r, subject, 2)
	is(t, err, errdefs.IsDataLoss)
	if string(f.manifests[tag].content) != tinyManifest {
		t.Error("a tag that is of something else was overwritten")
	}
	// Replies of the API that are not lists. The list under the tag is used, and no other host is asked.
	for body, contentType := range map[string]string{
		`{"message":"no such route"}`: "application/json",
		`{"manifests":[]}`:            "application/json",
		`{"schemaVersion":2}`:         ocispec.MediaTypeImageIndex,
		`<html>`:                      "text/html",
		``:                            "",
		`{"manifests":[{"digest":"x"}],"errors":1}`: "text/plain",
	} {
		f := newFake(t)
		r := open(t, f.host(), Options{})
		id, _, err := putArtifact(t, r, subject, 1)
		if err != nil {
			t.Fatal(err)
		}
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			if !strings.Contains(r.URL.Path, "/referrers/") {
				return false
			}
			w.Header().Set("Content-Type", contentType)
			fmt.Fprint(w, body)
			return true
		})
		if got, err := referrersOf(r, subject); err != nil || !slices.Equal(got, []digest.Digest{id}) {
			t.Errorf("%s %s: %v, %v", contentType, body, got, err)
		}
		f.mu.Lock()
		f.manifests = map[string]entry{}
		f.mu.Unlock()
		_, err = referrersOf(r, subject)
		is(t, err, errdefs.IsDataLoss) // no host has replied that there are none
	}
	// A registry that redirects the request to an address at which nothing listens.
	for _, status := range []int{403, 404, 418, 503} {
		other := newFake(t)
		other.reply(func(w http.ResponseWriter, r *http.Request, n int) bool { w.WriteHeader(status); return true })
		f := newFake(t)
		r := open(t, f.host(), Options{})
		id, _, err := putArtifact(t, r, subject, 1)
		if err != nil {
			t.Fatal(err)
		}
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			if !strings.Contains(r.URL.Path, "/referrers/") {
				return false
			}
			http.Redirect(w, r, other.URL+"/x", http.StatusSeeOther)
			return true
		})
		got, err := referrersOf(r, subject)
		if status == 503 {
			is(t, err, errdefs.IsAborted) // whether there are any is unknown
		} else if err != nil || !slices.Equal(got, []digest.Digest{id}) {
			t.Errorf("elsewhere %d: %v, %v", status, got, err)
		}
	}
}

func TestReferrersTag(t *testing.T) {
	long := digest.SHA512.FromString("subject")
	for subject, want := range map[digest.Digest]string{
		digest.FromString("subject"): "sha256-" + digest.FromString("subject").Encoded(),
		long:                         "sha512-" + long.Encoded()[:64],
	} {
		if got := referrersTag(subject).tag; got != want {
			t.Errorf("%s: %s", subject, got)
		}
	}
	f := newFake(t)
	r := open(t, f.host(), Options{})
	id, _, err := putArtifact(t, r, long, 1)
	if got, lerr := referrersOf(r, long); errors.Join(err, lerr) != nil || !slices.Equal(got, []digest.Digest{id}) {
		t.Errorf("%v, %v, %v", got, err, lerr)
	}
}

// A list that has the same entries on each page would have no end.
func TestReferrersInCircles(t *testing.T) {
	subject := digest.FromString("subject")
	f := newFake(t)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
		w.Header().Set("Link", fmt.Sprintf("</v2/x/referrers/%s?page=%d>; rel=next", subject, n))
		fmt.Fprintf(w, `{"manifests":[{"mediaType":%q,"digest":%q,"size":1}]}`, ocispec.MediaTypeImageManifest, subject)
		return true
	})
	got, err := referrersOf(open(t, f.host(), Options{}), subject)
	is(t, err, errdefs.IsDataLoss)
	if len(got) > 1 || f.count() > 2 {
		t.Errorf("%d referrers, %d requests", len(got), f.count())
	}
}
