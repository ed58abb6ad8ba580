package remotes

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func tags(r Remote) (list []string, err error) {
	for tag, err := range r.Tags(context.Background()) {
		if err != nil {
			return list, err
		}
		list = append(list, tag)
	}
	return list, nil
}

func TestTags(t *testing.T) {
	f := newFake(t)
	pages := map[string]string{"": `["a","b"]`, "b": `["c"]`, "c": `null`}
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if r.URL.Path != "/v2/x/tags/list" {
			return false
		}
		if n == 2 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		}
		last := r.URL.Query().Get("last")
		if last != "c" && pages[last] != `["c"]` {
			w.Header().Add("Link", `</v2/x/other>; rel="previous"`)
			w.Header().Add("Link", `<list?n=2&last=b>; rel="next"`)
		}
		fmt.Fprintf(w, `{"name":"x","tags":%s}`, pages[last])
		return true
	})
	got, err := tags(open(t, f.host(), Options{}))
	if err != nil || !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Fatalf("%q, %v", got, err)
	}
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool { fmt.Fprint(w, `{"tags":null}`); return true })
	if got, err := tags(open(t, f.host(), Options{})); err != nil || len(got) != 0 {
		t.Errorf("no tags: %q, %v", got, err)
	}
	f.reply(nil)
	_, err = tags(open(t, f.host(), Options{}))
	is(t, err, errdefs.IsNotFound)
}

// A list without an end, and a reply that is not a list, cost bounded time and memory.
func TestTagsHostile(t *testing.T) {
	t.Parallel()
	next := func(w http.ResponseWriter, s string) { w.Header().Set("Link", "<"+s+`>; rel="next"`) }
	for name, reply := range map[string]func(w http.ResponseWriter, r *http.Request, n int){
		"same page": func(w http.ResponseWriter, r *http.Request, n int) {
			next(w, r.URL.String())
			fmt.Fprint(w, `{"tags":["a"]}`)
		},
		"same tags": func(w http.ResponseWriter, r *http.Request, n int) {
			next(w, fmt.Sprintf("/v2/x/tags/list?last=%d", n))
			fmt.Fprint(w, `{"tags":["a"]}`)
		},
		"empty pages": func(w http.ResponseWriter, r *http.Request, n int) {
			next(w, fmt.Sprintf("/v2/x/tags/list?last=%d", n))
			fmt.Fprint(w, `{"tags":[]}`)
		},
		"endless pages": func(w http.ResponseWriter, r *http.Request, n int) {
			next(w, fmt.Sprintf("/v2/x/tags/list?last=%d", n))
			fmt.Fprintf(w, `{"tags":["a%d"`, n)
			fmt.Fprint(w, strings.Repeat(`,"b"`, 1<<16), `,"c`, n, `"]}`)
		},
		"small pages": func(w http.ResponseWriter, r *http.Request, n int) {
			next(w, fmt.Sprintf("/v2/x/tags/list?last=%d", n))
			fmt.Fprintf(w, `{"tags":["a%d"]}`, n)
		},
		"endless page": func(w http.ResponseWriter, r *http.Request, n int) {
			fmt.Fprint(w, `{"tags":["a"`)
			for {
				if _, err := fmt.Fprint(w, strings.Repeat(`,"b"`, 1<<12)); err != nil {
					return
				}
			}
		},
		"no list": func(w http.ResponseWriter, r *http.Request, n int) { fmt.Fprint(w, `<html>`) },
		"bad link": func(w http.ResponseWriter, r *http.Request, n int) {
			next(w, "%zz")
			fmt.Fprint(w, `{"tags":["a"]}`)
		},
	} {
		f := newFake(t)
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool { reply(w, r, n); return true })
		got, err := tags(open(t, f.host(), Options{}))
		t.Log(name, len(got), err)
		is(t, err, errdefs.IsDataLoss)
		if n := f.count(); n > 100 && name != "small pages" || n > maxPages {
			t.Errorf("%s: %d requests", name, n)
		}
	}
	// The next page is requested from the same registry, whatever the link says.
	elsewhere, f := newFake(t), newFake(t)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if n == 1 {
			next(w, elsewhere.URL+"/v2/x/tags/list?last=a")
			fmt.Fprint(w, `{"tags":["a"]}`)
		} else {
			fmt.Fprint(w, `{"tags":["b"]}`)
		}
		return true
	})
	if got, err := tags(open(t, f.host(), Options{})); err != nil || len(got) != 2 || elsewhere.count() != 0 {
		t.Errorf("%q, %v", got, err)
	}
	// A consumer may stop early.
	for range open(t, f.host(), Options{}).Tags(context.Background()) {
		break
	}
}

func TestReferrers(t *testing.T) {
	subject := digest.FromString("subject")
	entry := func(n string) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(n), Size: 5, ArtifactType: "type/" + n}
	}
	list := func(r Remote, artifactType string) (list []string, err error) {
		for desc, err := range r.Referrers(context.Background(), subject, ReferrerFilter{ArtifactType: artifactType}) {
			if err != nil {
				return list, err
			}
			list = append(list, desc.ArtifactType)
		}
		return list, nil
	}
	index := func(entries ...ocispec.Descriptor) []byte {
		b, _ := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: entries})
		return b
	}
	for _, how := range []string{"list", "tag"} {
		f := newFake(t)
		if how == "list" {
			f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
				if r.URL.Path != "/v2/x/referrers/"+subject.String() {
					return false
				}
				w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
				if r.URL.Query().Get("page") == "" {
					w.Header().Set("Link", `<`+r.URL.Path+`?page=2>; rel="next"`)
					w.Write(index(entry("a")))
				} else {
					w.Write(index(entry("b")))
				}
				return true
			})
		} else {
			f.manifest("sha256-"+subject.Encoded(), ocispec.MediaTypeImageIndex, index(entry("a"), entry("b")))
		}
		r := open(t, f.host(), Options{})
		for artifactType, want := range map[string][]string{"": {"type/a", "type/b"}, "type/b": {"type/b"}, "type/c": nil} {
			if got, err := list(r, artifactType); err != nil || !slices.Equal(got, want) {
				t.Errorf("%s of %q: %q, %v", how, artifactType, got, err)
			}
		}
	}
	f := newFake(t)
	if got, err := list(open(t, f.host(), Options{}), ""); err != nil || len(got) != 0 {
		t.Errorf("none: %q, %v", got, err)
	}
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		w.WriteHeader(http.StatusForbidden)
		return true
	})
	_, err := list(open(t, f.host(), Options{}), "")
	is(t, err, errdefs.IsPermissionDenied)
}

func TestDelete(t *testing.T) {
	ctx := context.Background()
	// Registries that delete tags, that delete only manifests, and that delete nothing.
	for _, kind := range []string{"tags", "manifests", "nothing"} {
		f := newFake(t)
		desc := f.manifest("a", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
		f.manifest("b", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			id := strings.TrimPrefix(r.URL.Path, "/v2/x/manifests/")
			isDigest := strings.Contains(id, ":")
			switch m, ok := f.manifests[id]; {
			case r.Method != http.MethodDelete:
				return false
			case kind == "nothing" || kind == "manifests" && !isDigest:
				w.WriteHeader(http.StatusMethodNotAllowed)
			case !ok:
				return false
			default:
				for name, other := range f.manifests {
					if name == id || isDigest && digest.FromBytes(other.content) == digest.FromBytes(m.content) {
						delete(f.manifests, name)
					}
				}
				w.WriteHeader(http.StatusAccepted)
			}
			return true
		})
		r := open(t, f.host(), Options{})
		is(t, r.Delete(ctx, "nope"), errdefs.IsNotFound)
		if kind == "nothing" {
			is(t, r.Delete(ctx, "a"), errdefs.IsNotImplemented)
			is(t, r.Delete(ctx, desc.Digest.String()), errdefs.IsNotImplemented)
			if _, ok := f.manifests["a"]; !ok || digest.FromBytes(f.manifests["a"].content) != desc.Digest {
				t.Error("the tag was changed, though nothing can be deleted")
			}
			continue
		}
		if err := r.Delete(ctx, "a"); err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		if len(f.manifests) != 2 || f.manifests["b"].content == nil || f.manifests[desc.Digest.String()].content == nil {
			t.Errorf("%s: left are %v", kind, f.manifests)
		}
		if err := r.Delete(ctx, desc.Digest.String()); err != nil || len(f.manifests) != 0 {
			t.Errorf("%s: left are %v, %v", kind, f.manifests, err)
		}
	}
}

// A name that can't be used in a request is left out of the list, with one warning. Repositories are listed in the same
// way as tags.
func TestNamesLeftOut(t *testing.T) {
	for path, list := range map[string]string{"/v2/x/tags/list": "tags", "/v2/_catalog": "repositories"} {
		f := newFake(t)
		scope := ""
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			switch {
			case r.URL.Path == "/token":
				scope = r.URL.Query().Get("scope")
				fmt.Fprint(w, `{"token":"t"}`)
			case r.URL.Path != path:
				return false
			case r.Header.Get("Authorization") == "":
				w.Header().Set("Www-Authenticate", `Bearer realm="`+f.URL+`/token"`)
				w.WriteHeader(http.StatusUnauthorized)
			case !r.URL.Query().Has("last"):
				w.Header().Set("Link", "<"+path+`?last=b>; rel="next"`)
				fmt.Fprintf(w, `{"name":"x",%q:["a","","a\u001b[31m\n","../b","b"]}`, list)
			default:
				fmt.Fprintf(w, `{%q:["c","-d"]}`, list)
			}
			return true
		})
		var told []string
		o := Options{Notify: func(s string) { told = append(told, s) }, HostsDir: t.TempDir()}
		names := open(t, f.host(), o).Tags(context.Background())
		want := "repository:x:pull"
		if list == "repositories" {
			names, want = Repositories(context.Background(), f.host(), o), "registry:catalog:*"
		}
		var got []string
		for name, err := range names {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, name)
		}
		if !slices.Equal(got, []string{"a", "b", "c"}) || scope != want {
			t.Errorf("%s: %q, scope %q", list, got, scope)
		}
		if len(told) != 1 || strings.ContainsAny(told[0], "\x1b\n") {
			t.Errorf("%s: told %q", list, told)
		}
	}
	for _, host := range []string{"", "x", "./x", "http::x", "h.example/x:1"} {
		for _, err := range Repositories(context.Background(), host, Options{}) {
			is(t, err, errdefs.IsInvalidArgument)
		}
	}
}

// Limits are read from the reply to a HEAD, which does not count against them.
func TestRateLimits(t *testing.T) {
	f := newFake(t)
	f.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	for _, c := range []struct {
		header http.Header
		want   Limits
	}{
		{http.Header{"RateLimit-Limit": {"100;w=21600"}, "RateLimit-Remaining": {"76;w=21600"}, "Docker-RateLimit-Source": {"192.0.2.1"}}, Limits{100, 76, 6 * time.Hour, "192.0.2.1"}},
		{http.Header{"X-RateLimit-Limit": {"5000"}, "X-RateLimit-Remaining": {"0"}}, Limits{5000, 0, 0, ""}},
		{http.Header{"RateLimit-Remaining": {"7 ; w=60"}, "RateLimit-Limit": {"many"}}, Limits{-1, 7, time.Minute, ""}},
		{http.Header{"RateLimit-Limit": {"9999999999999999999;w=1"}}, Limits{}},
		{http.Header{"RateLimit-Limit": {"-1"}, "RateLimit-Remaining": {""}}, Limits{}},
		{nil, Limits{}},
	} {
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			for name, values := range c.header {
				w.Header()[http.CanonicalHeaderKey(name)] = values
			}
			return false
		})
		got, err := RateLimits(context.Background(), open(t, f.host(), Options{}), "latest")
		if c.want == (Limits{}) {
			is(t, err, errdefs.IsNotFound)
		} else if err != nil || got != c.want {
			t.Errorf("%v: %+v, %v", c.header, got, err)
		}
		if seen := f.seen(); len(seen) != 1 || !strings.HasPrefix(seen[0], "HEAD ") {
			t.Errorf("asked by %q", seen)
		}
	}
	_, err := RateLimits(context.Background(), &Layout{dir: t.TempDir()}, "latest")
	is(t, err, errdefs.IsNotImplemented)
}
