package remotes

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// inSmallChunks makes the chunks of uploads short, so that tests need little content.
func inSmallChunks(r *Registry) *Registry {
	for _, c := range r.clients {
		c.chunk = smallChunk
	}
	return r
}

const smallChunk = 1 << 20

// isUpload reports whether a request sends content to an upload.
func isUpload(r *http.Request) bool {
	return strings.HasPrefix(r.URL.Path, "/v2/x/blobs/uploads/") && (r.Method == http.MethodPut || r.Method == http.MethodPatch)
}

func refuse(w http.ResponseWriter, status int, code, message string) bool {
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":%q}]}`, code, message)
	return true
}

// saved reports whether an upload is saved for another process.
func saved(t *testing.T, shared string) bool {
	files, err := filepath.Glob(filepath.Join(shared, "upload-*"))
	return err != nil || len(files) > 0
}

// cutAfter makes the registry keep n bytes of a request, and closes the connection.
func (f *fake) cutAfter(r *http.Request, n int64) {
	if n < r.ContentLength {
		r.Body = io.NopCloser(io.LimitReader(r.Body, n))
	}
	r.Method = http.MethodPatch
	f.store(httptest.NewRecorder(), r)
	panic(http.ErrAbortHandler)
}

// A blob of a known size is sent in one request, from a pipe, too. If that is refused, it is sent in chunks, and in
// smaller ones if these are refused, too. A refusal that remains is reported in the registry's words, and is not a
// temporary failure.
func TestPutLimits(t *testing.T) {
	content := noise(3*chunkSize + 100)
	d := digest.FromBytes(content)
	for _, c := range []struct {
		what   string
		refuse func(r *http.Request) int
		pipe   bool // whether content that can be read only once, and has another length than the hint says, is stored, too
	}{
		{"nothing", func(r *http.Request) int { return 0 }, true},
		{"PATCH", func(r *http.Request) int { return map[string]int{http.MethodPatch: 405}[r.Method] }, false},
		{"a PUT with content", func(r *http.Request) int {
			if r.Method == http.MethodPut && r.ContentLength > chunkSize {
				return 501
			}
			return 0
		}, true},
		{"PATCH of more than 4 MiB, 416", limit(http.MethodPatch, 4<<20, 416), true},
		{"PATCH of more than 4 MiB, 413", limit(http.MethodPatch, 4<<20, 413), true},
		{"requests of more than 4 MiB, 413", limit("", 4<<20, 413), true},
		{"requests of more than 1 MiB, 413", limit("", 1<<20, 413), true},
		{"requests of more than 100 KiB, 413", limit("", 100<<10, 413), true},
	} {
		for name, reader := range readers {
			for _, hint := range []string{"-", fmt.Sprintf("size:%d", len(content))} {
				f := newFake(t)
				f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
					status := c.refuse(r)
					return isUpload(r) && status != 0 && refuse(w, status, "BLOB_UPLOAD_INVALID", "not in this way")
				})
				_, err := open(t, f.host(), Options{}).Push(context.Background(), d.String(), reader(t, content), hint)
				if name == "pipe" && hint == "-" && !c.pipe {
					if err == nil || isTemporary(err) || !strings.Contains(err.Error(), "not in this way") {
						t.Errorf("refused %s, %s %s: %v", c.what, name, hint, err)
					}
				} else if err != nil || !bytes.Equal(f.blobs[d], content) {
					t.Errorf("refused %s, %s %s: %v", c.what, name, hint, err)
				}
				if len(f.uploads) > 0 {
					t.Errorf("refused %s, %s %s: %d uploads are left", c.what, name, hint, len(f.uploads))
				}
			}
		}
	}
	for _, status := range []int{413, 416} {
		for name, reader := range readers {
			f, shared := newFake(t), runtimeDir(t)
			f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
				return isUpload(r) && refuse(w, status, "BLOB_UPLOAD_INVALID", "the quota is exceeded")
			})
			_, err := open(t, f.host(), Options{}).Push(context.Background(), d.String(), reader(t, content))
			if err == nil || isTemporary(err) || !strings.Contains(err.Error(), "the quota is exceeded") {
				t.Errorf("%s, %d: %v", name, status, err)
			}
			if saved(t, shared) || len(f.uploads) > 0 {
				t.Errorf("%s, %d: an upload that can't go on is kept", name, status)
			}
		}
	}
}

// limit refuses requests of a method whose body is longer than most.
func limit(method string, most int64, status int) func(r *http.Request) int {
	return func(r *http.Request) int {
		if (method == "" || r.Method == method) && r.ContentLength > most {
			return status
		}
		return 0
	}
}

// If a pipe does not have the stated size, nothing is stored.
func TestPutPipeOfAnotherSize(t *testing.T) {
	t.Parallel()
	for _, size := range []int{0, 1, 1000, (retained+1)*chunkSize + 5} {
		for _, more := range []int{-1, 1, 2 * chunkSize} {
			f := newFake(t)
			content := noise(size)
			d := digest.FromBytes(content)
			given := append(bytes.Clone(content), make([]byte, max(more, 0))...)
			_, err := open(t, f.host(), Options{}).Push(context.Background(), d.String(), pipe(t, given[:max(size+more, 0)]), fmt.Sprintf("size:%d", size))
			if size+more < 0 && err == nil {
				continue // the pipe is empty, and so is the blob
			}
			is(t, err, errdefs.IsDataLoss)
			if len(f.blobs)+len(f.uploads) > 0 {
				t.Errorf("%d bytes and %d more: %d blobs, %d uploads", size, more, len(f.blobs), len(f.uploads))
			}
		}
	}
}

// The offset that a registry states is believed if it is possible. A false one never leads to another blob, nor to
// success without the blob.
func TestPutRangeOfARegistry(t *testing.T) {
	content := noise(4*smallChunk + 100)
	d := digest.FromBytes(content)
	var first, last int64 // the chunks that were received
	for what, says := range map[string]func(have int64) string{
		"the first chunk":    func(have int64) string { return fmt.Sprintf("0-%d", min(have, first)-1) },
		"the last chunk":     func(have int64) string { return fmt.Sprintf("0-%d", last-1) },
		"relative":           func(have int64) string { return fmt.Sprintf("%d-%d", have-last, have-1) },
		"one more":           func(have int64) string { return fmt.Sprintf("0-%d", have) },
		"one less":           func(have int64) string { return fmt.Sprintf("0-%d", have-2) },
		"nothing":            func(have int64) string { return "" },
		"0-0":                func(have int64) string { return "0-0" },
		"more than there is": func(have int64) string { return "0-99999999999" },
		"an overflow":        func(have int64) string { return "0-9223372036854775807" },
		"another overflow":   func(have int64) string { return "0-99999999999999999999" },
		"no range":           func(have int64) string { return "bytes" },
		"negative":           func(have int64) string { return "0--5" },
		"with a unit":        func(have int64) string { return fmt.Sprintf("bytes=0-%d", have-1) },
		"enormous":           func(have int64) string { return strings.Repeat("0-1,", 10000) },
	} {
		for name, reader := range readers {
			for _, hint := range []string{"-", fmt.Sprintf("size:%d", len(content))} {
				for _, at := range []int64{1, smallChunk / 2, smallChunk} {
					f, shared := newFake(t), runtimeDir(t)
					first, last = 0, 0
					sent, cut := 0, false
					f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
						if !strings.HasPrefix(r.URL.Path, "/v2/x/blobs/uploads/") || r.Method == http.MethodPost {
							return false
						}
						id := strings.TrimPrefix(r.URL.Path, "/v2/x/blobs/uploads/")
						f.mu.Lock()
						have := int64(len(f.uploads[id]))
						f.mu.Unlock()
						if isUpload(r) && have > 0 && r.ContentLength > 0 {
							last = r.ContentLength
						} else if isUpload(r) && r.ContentLength > 0 {
							first, last = min(r.ContentLength, smallChunk), min(r.ContentLength, smallChunk)
						}
						if isUpload(r) {
							if sent++; !cut && (sent == 2 || r.ContentLength > 2*smallChunk) {
								cut = true
								f.cutAfter(r, at)
							}
						}
						rec := httptest.NewRecorder()
						f.store(rec, r)
						if rec.Header().Get("Range") != "" || rec.Code == http.StatusRequestedRangeNotSatisfiable {
							f.mu.Lock()
							have = int64(len(f.uploads[id]))
							f.mu.Unlock()
							rec.Header()["Range"] = []string{says(have)}
						}
						for k, v := range rec.Header() {
							w.Header()[k] = v
						}
						w.WriteHeader(rec.Code)
						w.Write(rec.Body.Bytes())
						return true
					})
					r := inSmallChunks(open(t, f.host(), Options{}))
					_, err := r.Push(context.Background(), d.String(), reader(t, content), hint)
					if err != nil && name == "pipe" {
						if !errdefs.IsAborted(err) { // a later attempt stores it
							t.Errorf("Range tells %s, %s %s cut at %d: %v", what, name, hint, at, err)
						}
						_, err = inSmallChunks(open(t, f.host(), Options{})).Push(context.Background(), d.String(), reader(t, content), hint)
					}
					if err != nil || !bytes.Equal(f.blobs[d], content) || len(f.blobs) != 1 {
						t.Errorf("Range tells %s, %s %s cut at %d: %v", what, name, hint, at, err)
					}
					if saved(t, shared) {
						t.Errorf("Range tells %s, %s %s cut at %d: the upload is kept", what, name, hint, at)
					}
				}
			}
		}
	}
}

// The last chunk is sent with the request that completes the upload.
func TestPutClosesWithContent(t *testing.T) {
	for name, reader := range readers {
		for _, size := range []int{1, smallChunk - 1, smallChunk, smallChunk + 1, 4 * smallChunk} {
			content := noise(size)
			d := digest.FromBytes(content)
			for _, at := range []int{-1, size / 3, size} {
				f, shared := newFake(t), runtimeDir(t)
				cut, all := false, false
				f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
					if r.Method == http.MethodPut && isUpload(r) && at >= 0 && !cut {
						cut, all = true, int64(at) >= r.ContentLength
						f.cutAfter(r, int64(at))
					}
					return r.Method == http.MethodPut && isUpload(r) && r.ContentLength <= 0 && refuse(w, 500, "UNKNOWN", "")
				})
				r := inSmallChunks(open(t, f.host(), Options{}))
				_, err := r.Push(context.Background(), d.String(), reader(t, content))
				if name == "pipe" && all && size > (retained+1)*smallChunk { // the registry has everything, and nothing can be sent again
					is(t, err, errdefs.IsAborted)
					_, err = r.Push(context.Background(), d.String(), reader(t, content))
				}
				if err != nil || !bytes.Equal(f.blobs[d], content) {
					t.Errorf("%s of %d, cut at %d: %v", name, size, at, err)
				}
				if saved(t, shared) {
					t.Errorf("%s of %d: the upload is kept", name, size)
				}
			}
		}
	}
}

// The address of an upload is not changed, except that the digest is added for the last request.
func TestPutOpaqueLocation(t *testing.T) {
	t.Parallel()
	content := noise(2*chunkSize + 5)
	d := digest.FromBytes(content)
	for _, location := range []string{
		"?state=a;b", "?state=50%zz", "?state=a%20b", "?z=1&a=2", "?state=a/b=&flag", "?", "?digest=", "?a=b&", "?%64=1&a+b=%2B", "", "/a%2Fb/c?x", "/a;b=c/,d",
		"?" + strings.Repeat("a", 8000),
	} {
		for name, reader := range readers {
			f := newFake(t)
			var bad []string
			path, query, hasQuery := strings.Cut(location, "?")
			f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
				if !strings.HasPrefix(r.URL.Path, "/v2/x/blobs/uploads/") {
					return false
				}
				sent := r.RequestURI
				if r.Method == http.MethodPut {
					var ok bool
					if sent, ok = strings.CutSuffix(sent, "digest="+url.QueryEscape(d.String())); !ok {
						bad = append(bad, r.RequestURI)
					}
					sent = strings.TrimSuffix(sent, map[bool]string{true: "&", false: "?"}[query != ""])
				}
				want := "/v2/x/blobs/uploads/1" + path
				if query != "" || hasQuery && r.Method != http.MethodPut {
					want += "?" + query
				}
				if r.Method != http.MethodPost && sent != want {
					bad = append(bad, r.RequestURI)
				}
				if r.Method != http.MethodPost {
					r.URL.Path = "/v2/x/blobs/uploads/1"
				}
				r.URL.RawQuery = "digest=" + d.String()
				rec := httptest.NewRecorder()
				f.store(rec, r)
				rec.Header().Set("Location", "/v2/x/blobs/uploads/1"+location)
				for k, v := range rec.Header() {
					w.Header()[k] = v
				}
				w.WriteHeader(rec.Code)
				return true
			})
			_, err := open(t, f.host(), Options{}).Push(context.Background(), d.String(), reader(t, content))
			if err != nil || !bytes.Equal(f.blobs[d], content) || len(bad) > 0 {
				t.Errorf("%.50q, %s: %v: asked %q", location, name, err, bad)
			}
		}
	}
}

// If a mount is refused, in whatever way, the blob is uploaded. Only the mount request names the other repository.
func TestPutMountRefused(t *testing.T) {
	content := noise(100)
	d := digest.FromBytes(content)
	for _, status := range []int{200, 202, 204, 400, 401, 403, 404, 405, 416, 500, 501} {
		k := newTokens(t)
		k.user = "me:word"
		dockerConfig(t, `{"auths":{"`+k.host()+`":{"auth":"`+basic("me:word")+`"}}}`)
		mounts := 0
		inner := k.fault
		k.fault = func(w http.ResponseWriter, r *http.Request, n int) bool {
			if r.URL.Query().Get("mount") == "" {
				return inner(w, r, n)
			}
			if r.Header.Get("Authorization") == "" {
				return inner(w, r, n)
			}
			if mounts++; status == 500 && mounts > 1 {
				status = 403
			}
			if status < 300 {
				r.URL.RawQuery = ""
				return false
			}
			return refuse(w, status, "DENIED", "no")
		}
		p, err := open(t, k.host(), Options{}).Push(context.Background(), d.String(), pipe(t, content), "mediatype:a/b", "mount:secret/base")
		if err != nil || p.State != Stored || !bytes.Equal(k.blobs[d], content) {
			t.Errorf("%d: %+v, %v", status, p, err)
		}
		for i := range k.count() {
			if r := k.request(i); strings.Contains(r.URL.RawQuery, "secret%2Fbase") != (r.Method == http.MethodPost && r.URL.Query().Has("from")) && !strings.Contains(r.URL.Path, "token") {
				t.Errorf("%d: %s %s", status, r.Method, r.URL)
			}
		}
	}
}

// A tag that has the manifest already is not put again. With IfAbsent a tag that has another manifest is not changed.
func TestPutTag(t *testing.T) {
	ctx := context.Background()
	tiny := []byte(tinyManifest)
	other := []byte(strings.Replace(tinyManifest, "{", `{"annotations":{"a":"b"},`, 1))
	immutable := func(f *fake) func(w http.ResponseWriter, r *http.Request, n int) bool {
		return func(w http.ResponseWriter, r *http.Request, n int) bool {
			f.mu.Lock()
			_, there := f.manifests[strings.TrimPrefix(r.URL.Path, "/v2/x/manifests/")]
			f.mu.Unlock()
			return r.Method == http.MethodPut && strings.HasSuffix(r.URL.Path, "/v1") && there && refuse(w, 400, "TAG_INVALID", "the tag is immutable")
		}
	}
	f := newFake(t)
	f.reply(immutable(f))
	for _, ifAbsent := range []bool{false, true} {
		h := helper(t, t.TempDir()).(*Helper)
		h.options.IfAbsent = ifAbsent
		for name, r := range map[string]Remote{
			"registry": open(t, f.host(), Options{IfAbsent: ifAbsent}), "layout": &Layout{dir: t.TempDir(), ifAbsent: ifAbsent}, "helper": h,
		} {
			clear(f.manifests)
			put := func(b []byte, want State) error {
				t.Helper()
				p, err := r.Push(ctx, "v1", bytes.NewReader(b))
				if err == nil && p.State != want {
					t.Errorf("%s, %v: %s, not %s", name, ifAbsent, p.State, want)
				}
				return err
			}
			if err := put(tiny, Stored); err != nil {
				t.Fatal(name, err)
			}
			if err := put(tiny, Exists); err != nil {
				t.Error(name, err)
			}
			err := put(other, Stored)
			switch {
			case ifAbsent:
				is(t, err, errdefs.IsAlreadyExists)
			case name == "registry":
				if err == nil || !strings.Contains(err.Error(), "immutable") || isTemporary(err) {
					t.Errorf("%s: %v", name, err)
				}
			case err != nil:
				t.Error(name, err)
			}
			desc, err := r.Resolve(ctx, "v1")
			if moved := desc.Digest == digest.FromBytes(other); err != nil || moved != (name != "registry" && !ifAbsent) {
				t.Errorf("%s, %v: %+v, %v", name, ifAbsent, desc, err)
			}
		}
	}
	// If a registry does not state the digest of a tag, the manifest is requested. If another client was quicker, the
	// registry refuses.
	r := open(t, f.host(), Options{IfAbsent: true})
	for _, how := range []string{"no digest", "another algorithm", "quicker"} {
		clear(f.manifests)
		if how != "quicker" {
			f.manifest("v1", "application/vnd.oci.image.manifest.v1+json", tiny)
		}
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			switch {
			case how == "quicker":
				return r.Header.Get("If-None-Match") == "*" && refuse(w, 412, "", "")
			case r.Method != http.MethodHead:
				return false
			case how == "another algorithm":
				w.Header().Set("Docker-Content-Digest", digest.SHA512.FromBytes(tiny).String())
			}
			w.Header().Set("Content-Length", strconv.Itoa(len(tiny)))
			w.WriteHeader(200)
			return true
		})
		_, err := r.Push(ctx, "v1", bytes.NewReader(other))
		is(t, err, errdefs.IsAlreadyExists)
		if p, err := r.Push(ctx, "v1", bytes.NewReader(tiny)); how != "quicker" && (err != nil || p.State != Exists) {
			t.Errorf("%s: %+v, %v", how, p, err)
		}
	}
	// HEAD only saves work: if it is refused, the put goes on, unless the tag must be absent.
	for _, status := range []int{400, 401, 403, 405, 501} {
		clear(f.manifests)
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			if r.Method != http.MethodPut {
				w.WriteHeader(status)
			}
			return r.Method != http.MethodPut
		})
		if p, err := open(t, f.host(), Options{}).Push(ctx, "v1", bytes.NewReader(tiny)); err != nil || p.State != Stored {
			t.Errorf("%d: %+v, %v", status, p, err)
		}
		if _, err := r.Push(ctx, "v1", bytes.NewReader(tiny)); err == nil {
			t.Errorf("%d: it is put though nobody knows whether it is there", status)
		}
	}
}

// If the tag exists and the manifest has a subject, the manifest is put by its digest, so that the registry lists it.
func TestPutTaggedReferrer(t *testing.T) {
	f := newFake(t)
	subject := digest.FromString("subject")
	content := []byte(fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"layers":[],"subject":{"digest":%q}}`, subject))
	f.manifest("v1", "application/vnd.oci.image.manifest.v1+json", content)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		return r.Method == http.MethodPut && strings.HasSuffix(r.URL.Path, "/v1") && refuse(w, 400, "TAG_INVALID", "the tag is immutable")
	})
	p, err := open(t, f.host(), Options{}).Push(context.Background(), "v1", bytes.NewReader(content))
	if err != nil || p.State != Exists {
		t.Fatalf("%+v, %v", p, err)
	}
	if got := f.listed(t, referrersTag(subject).tag); len(got) != 1 {
		t.Errorf("listed: %v", got)
	}
}
