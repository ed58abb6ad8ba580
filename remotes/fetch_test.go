package remotes

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var quiet = log.New(io.Discard, "", 0)

func TestFetchBlob(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	for _, size := range []int{0, 1, pieceSize - 1, pieceSize, pieceSize + 1, 2*pieces*pieceSize + 7} {
		content := noise(size)
		id := f.blob(content)
		r := open(t, f.host(), Options{})
		got, err := fetch(t, r, id, "-", "unknown:hint", fmt.Sprintf("size:%d", size), "offset:garbage")
		if err != nil || !bytes.Equal(got, content) {
			t.Fatalf("size %d: got %d bytes, %v", size, len(got), err)
		}
		body, err := r.Fetch(context.Background(), id)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if _, err := io.Copy(&out, body); err != nil || !bytes.Equal(out.Bytes(), content) {
			t.Fatalf("size %d: copied %d bytes, %v", size, out.Len(), err)
		}
	}
	if f.request(0).Header.Get("Accept-Encoding") != "identity" {
		t.Error("compression was not declined")
	}
}

func TestFetchSHA512(t *testing.T) {
	f := newFake(t)
	content := noise(1000)
	d := digest.SHA512.FromBytes(content)
	f.blobs[d] = content
	if got, err := fetch(t, open(t, f.host(), Options{}), d.String()); err != nil || !bytes.Equal(got, content) {
		t.Fatal(err)
	}
}

func TestFetchChoosesEndpoint(t *testing.T) {
	f := newFake(t)
	blob := f.blob(noise(10))
	m := f.manifest("latest", ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"layers":[]}`))
	for _, c := range []struct {
		id, hint string
		want     []string
	}{
		{"latest", "", []string{"manifests/latest"}},
		{"latest", "mediatype:" + ocispec.MediaTypeImageManifest, []string{"manifests/latest"}},
		{m.Digest.String(), "mediatype:" + m.MediaType, []string{"manifests/" + m.Digest.String()}},
		{m.Digest.String(), "", []string{"blobs/" + m.Digest.String(), "manifests/" + m.Digest.String()}},
		{m.Digest.String(), "mediatype:a/manifest", []string{"blobs/" + m.Digest.String(), "manifests/" + m.Digest.String()}},
		{blob, "", []string{"blobs/" + blob}},
		{blob, "mediatype:" + m.MediaType, []string{"manifests/" + blob, "blobs/" + blob}},
		{blob, "mediatype:" + ocispec.MediaTypeImageLayer, []string{"blobs/" + blob}},
	} {
		f.reset()
		if _, err := fetch(t, open(t, f.host(), Options{}), c.id, c.hint); err != nil {
			t.Errorf("%s %s: %v", c.id, c.hint, err)
		}
		for i := range c.want {
			c.want[i] = "GET /v2/x/" + c.want[i]
		}
		if got := f.seen(); !slices.Equal(got, c.want) {
			t.Errorf("%s %s: asked %q, not %q", c.id, c.hint, got, c.want)
		}
	}
}

// A registry may convert an object to a type that is accepted, if only one is. A registry that can't do that is asked
// again.
func TestFetchTagAcceptsHintAlone(t *testing.T) {
	f := newFake(t)
	f.manifest("latest", ocispec.MediaTypeImageIndex, []byte(`{"schemaVersion":2,"manifests":[]}`))
	docker := []byte(`{"schemaVersion":2,"layers":[],"mediaType":"` + mediaTypeDockerManifest + `"}`)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if r.Header.Get("Accept") == mediaTypeDockerManifest {
			w.Header().Set("Content-Type", mediaTypeDockerManifest)
			w.Write(docker)
			return true
		}
		return false
	})
	r := open(t, f.host(), Options{})
	if got, err := fetch(t, r, "latest", "mediatype:"+mediaTypeDockerManifest); err != nil || !bytes.Equal(got, docker) {
		t.Fatalf("%s, %v", got, err)
	}
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if strings.Contains(r.Header.Get("Accept"), ocispec.MediaTypeImageIndex) {
			return false
		}
		w.WriteHeader(http.StatusNotFound)
		return true
	})
	if got, err := fetch(t, r, "latest", "mediatype:"+mediaTypeDockerManifest); err != nil || !bytes.Contains(got, []byte("manifests")) {
		t.Fatalf("%s, %v", got, err)
	}
}

func TestFetchCutAtEveryPosition(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	content := noise(300)
	id := f.blob(content)
	r := open(t, f.host(), Options{})
	for n := range content {
		first := true
		f.reply(func(w http.ResponseWriter, r *http.Request, _ int) bool {
			if first {
				first = false
				cut(w, content, n)
			}
			return false
		})
		got, err := fetch(t, r, id)
		if err != nil || !bytes.Equal(got, content) {
			t.Fatalf("cut at %d: got %d bytes, %v", n, len(got), err)
		}
		last := f.request(-1).Header.Get("Range")
		if n > 0 && last != fmt.Sprintf("bytes=%d-", n) {
			t.Fatalf("cut at %d: went on with range %q", n, last)
		}
	}
}

// Progress resets the number of attempts: a large blob may be interrupted more often than that.
func TestFetchCutOften(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	content := noise(20 * 16 << 10)
	id := f.blob(content)
	for name, reply := range map[string]func(w http.ResponseWriter, from int){
		"range": func(w http.ResponseWriter, from int) {
			if from == 0 {
				cut(w, content, 16<<10)
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(content)-1, len(content)))
			w.Header().Set("Content-Length", fmt.Sprint(len(content)-from))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(content[from:min(from+16<<10, len(content))])
		},
		"range of unknown total": func(w http.ResponseWriter, from int) {
			if from == 0 {
				cut(w, content, 16<<10)
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/*", from, len(content)-1))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(content[from:min(from+16<<10, len(content))])
			w.(http.Flusher).Flush()
			if from+16<<10 < len(content) {
				panic(http.ErrAbortHandler)
			}
		},
		"whole": func(w http.ResponseWriter, from int) {
			w.Header().Set("Content-Length", fmt.Sprint(len(content)))
			w.Write(content[:min(from+16<<10, len(content))])
		},
	} {
		f.reply(func(w http.ResponseWriter, r *http.Request, _ int) bool {
			from := 0
			fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from)
			reply(w, from)
			return true
		})
		if got, err := fetch(t, open(t, f.host(), Options{}), id); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s: got %d bytes, %v", name, len(got), err)
		}
	}
}

func TestFetchStaysCut(t *testing.T) {
	f := newFake(t)
	content := noise(10000)
	id := f.blob(content)
	f.reply(func(w http.ResponseWriter, r *http.Request, _ int) bool {
		from := 0
		fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from)
		if from >= 5000 {
			panic(http.ErrAbortHandler)
		}
		cut(w, content, 5000)
		return true
	})
	got, err := fetch(t, open(t, f.host(), Options{}), id)
	is(t, err, errdefs.IsAborted)
	if len(got) > 5000 || !bytes.Equal(got, content[:len(got)]) {
		t.Errorf("gave %d bytes", len(got))
	}
	if n := f.count(); n != 1+maxTries-1 {
		t.Errorf("%d requests", n)
	}
}

// A reply with another range than the requested one is never used.
func TestFetchWrongRange(t *testing.T) {
	content := noise(1000)
	for _, header := range []string{
		"bytes 0-999/1000", "bytes 499-999/1000", "bytes 501-999/1000", "bytes 500-999/2000",
		"bytes 500-400/1000", "bytes 500-1000/1000", "bytes */1000", "items 500-999/1000", "", "bytes 500-999/x", "bytes -500-999/1000",
	} {
		f := newFake(t)
		id := f.blob(content)
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			if r.Header.Get("Range") == "" {
				return false
			}
			w.Header().Set("Content-Range", header)
			w.WriteHeader(http.StatusPartialContent)
			w.Write(content[:500])
			return true
		})
		got, err := fetch(t, open(t, f.host(), Options{}), id, "offset:500", "size:1000")
		if err != nil && !errdefs.IsDataLoss(err) || err == nil && !bytes.Equal(got, content[500:]) {
			t.Errorf("%q: got %d bytes, %v", header, len(got), err)
		}
	}
}

func TestFetchOffset(t *testing.T) {
	t.Parallel()
	content := noise(400000)
	for _, ranges := range []int{http.StatusPartialContent, http.StatusOK, http.StatusRequestedRangeNotSatisfiable, http.StatusNotImplemented} {
		f := newFake(t)
		id := f.blob(content)
		m := f.manifest("tag", ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"layers":[]}`))
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			if r.Header.Get("Range") == "" || ranges == http.StatusPartialContent {
				return false
			}
			w.WriteHeader(ranges)
			if ranges == http.StatusOK {
				w.Write(content)
			}
			return true
		})
		r := open(t, f.host(), Options{})
		for _, offset := range []int{0, 1, 65536, 131072, 200000, len(content) - 1, len(content)} {
			for _, hint := range []string{"-", fmt.Sprintf("size:%d", len(content))} {
				got, err := fetch(t, r, id, hint, fmt.Sprintf("offset:%d", offset))
				if err != nil || !bytes.Equal(got, content[offset:]) {
					t.Errorf("%d, offset %d: got %d bytes, %v", ranges, offset, len(got), err)
				}
			}
		}
		_, err := fetch(t, r, id, fmt.Sprintf("offset:%d", len(content)+1))
		is(t, err, errdefs.IsInvalidArgument)
		got, err := fetch(t, r, m.Digest.String(), "mediatype:"+m.MediaType, "offset:1")
		if err != nil || string(got) != `"schemaVersion":2,"layers":[]}` {
			t.Errorf("manifest from 1 on: %q, %v", got, err)
		}
	}
}

func TestFetchWrongSize(t *testing.T) {
	f := newFake(t)
	id := f.blob(noise(1000))
	m := f.manifest("tag", ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"layers":[]}`))
	r := open(t, f.host(), Options{})
	for _, size := range []string{"size:0", "size:999", "size:1001"} {
		_, err := fetch(t, r, id, size)
		is(t, err, errdefs.IsDataLoss)
		_, err = fetch(t, r, id, size, "offset:100")
		is(t, err, errdefs.IsDataLoss)
		_, err = fetch(t, r, m.Digest.String(), "mediatype:"+m.MediaType, size)
		is(t, err, errdefs.IsDataLoss)
	}
	// Without a length in the header, no more bytes may be written than the caller expects.
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		w.(http.Flusher).Flush()
		for {
			if _, err := w.Write(noise(1 << 16)); err != nil {
				return true
			}
		}
	})
	got, err := fetch(t, r, id, "size:1000")
	is(t, err, errdefs.IsDataLoss)
	if len(got) > 1000 {
		t.Errorf("gave %d bytes of an endless body", len(got))
	}
}

// The last bytes are held back until the digest has been verified.
func TestFetchWrongDigest(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1, 1000, pieceSize, 3 * pieceSize, 2*pieces*pieceSize + 7} {
		f := newFake(t)
		content := noise(size)
		id := f.blob(content)
		wrong := slices.Clone(content)
		wrong[size-1] ^= 1
		f.blobs[digest.Digest(id)] = wrong
		r := open(t, f.host(), Options{})
		got, err := fetch(t, r, id)
		is(t, err, errdefs.IsDataLoss)
		if len(got) >= size {
			t.Errorf("all %d bytes of what does not verify were given", size)
		}
		body, err := r.Fetch(context.Background(), id)
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, body)
		is(t, err, errdefs.IsDataLoss)
		if n >= int64(size) {
			t.Errorf("all %d bytes of what does not verify were copied", size)
		}
	}
}

// A caller that hashes a blob itself may read it unverified, but not with another length. Manifests are always
// verified.
func TestFetchUnverified(t *testing.T) {
	f := newFake(t)
	content := noise(3 * pieceSize)
	id := f.blob(content)
	wrong := slices.Clone(content)
	wrong[0] ^= 1
	f.blobs[digest.Digest(id)] = wrong
	m := f.manifest("", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	f.manifests[m.Digest.String()] = entry{m.MediaType, []byte(tinyManifest + " ")}
	for _, parts := range []int{1, 4} {
		r := open(t, f.host(), Options{Unverified: true, Parts: parts})
		if got, err := fetch(t, r, id); err != nil || !bytes.Equal(got, wrong) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		_, err := fetch(t, r, id, fmt.Sprintf("size:%d", len(content)+1))
		is(t, err, errdefs.IsDataLoss)
		_, err = fetch(t, r, m.Digest.String(), "mediatype:"+m.MediaType)
		is(t, err, errdefs.IsDataLoss)
	}
}

func TestFetchWrongManifest(t *testing.T) {
	t.Parallel()
	good := []byte(`{"schemaVersion":2,"layers":[]}`)
	id := digest.FromBytes(good).String()
	serve := func(mediaType, contentDigest, body string) func(http.ResponseWriter, *http.Request, int) bool {
		return func(w http.ResponseWriter, r *http.Request, _ int) bool {
			w.Header().Set("Content-Type", mediaType)
			if contentDigest != "" {
				w.Header().Set("Docker-Content-Digest", contentDigest)
			}
			io.WriteString(w, body)
			return true
		}
	}
	for name, c := range map[string]struct {
		mediaType, contentDigest, body string
		class                          func(error) bool
	}{
		"other":            {ocispec.MediaTypeImageManifest, id, `{"schemaVersion":2,"layers":[ ]}`, errdefs.IsDataLoss},
		"html":             {"text/html; charset=utf-8", "", "<!DOCTYPE html><html>log in</html>", errdefs.IsDataLoss},
		"html undercover":  {ocispec.MediaTypeImageManifest, "", "\n <html>log in</html>", errdefs.IsDataLoss},
		"schema 1":         {"application/vnd.docker.distribution.manifest.v1+prettyjws", "", `{"schemaVersion":1,"fsLayers":[]}`, errdefs.IsNotImplemented},
		"schema 1 as json": {"application/json", digest.FromString(`{"schemaVersion":1,"fsLayers":[]}`).String(), `{"schemaVersion":1,"fsLayers":[]}`, nil},
		"too large":        {ocispec.MediaTypeImageManifest, "", strings.Repeat(" ", MaxManifest+1), errdefs.IsDataLoss},
	} {
		f := newFake(t)
		f.reply(serve(c.mediaType, c.contentDigest, c.body))
		r := open(t, f.host(), Options{})
		class := c.class
		if class == nil {
			class = errdefs.IsNotImplemented
		}
		_, err := fetch(t, r, "latest")
		t.Log(name, err)
		is(t, err, class)
		if c.class != nil {
			_, err = fetch(t, r, id, "mediatype:"+ocispec.MediaTypeImageManifest)
			is(t, err, class)
		}
	}
	f := newFake(t)
	f.reply(serve(ocispec.MediaTypeImageManifest, "", "not JSON"))
	_, err := fetch(t, open(t, f.host(), Options{}), "latest")
	is(t, err, errdefs.IsDataLoss)
}

func TestFetchEndlessManifest(t *testing.T) {
	f := newFake(t)
	f.reply(func(w http.ResponseWriter, r *http.Request, _ int) bool {
		if strings.HasSuffix(r.URL.Path, "/refused") {
			w.WriteHeader(http.StatusForbidden)
		}
		for {
			if _, err := w.Write(bytes.Repeat([]byte("\x1b[31m {"), 1<<12)); err != nil {
				return true
			}
		}
	})
	r := open(t, f.host(), Options{})
	_, err := fetch(t, r, "latest")
	is(t, err, errdefs.IsDataLoss)
	_, err = fetch(t, r, "refused")
	is(t, err, errdefs.IsPermissionDenied)
}

func TestFetchManifestCut(t *testing.T) {
	f := newFake(t)
	content := []byte(`{"schemaVersion":2,"layers":[]}`)
	f.manifest("latest", ocispec.MediaTypeImageManifest, content)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if n < maxTries {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			cut(w, content, n)
		}
		return false
	})
	if got, err := fetch(t, open(t, f.host(), Options{}), "latest"); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("%q, %v", got, err)
	}
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		cut(w, content, 5)
		return true
	})
	_, err := fetch(t, open(t, f.host(), Options{}), "latest")
	is(t, err, errdefs.IsAborted)
}

func TestErrorClasses(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	for status, class := range map[int]func(error) bool{
		401: errdefs.IsUnauthorized, 403: errdefs.IsPermissionDenied, 404: errdefs.IsNotFound,
		408: errdefs.IsDeadlineExceeded, 429: errdefs.IsResourceExhausted,
		500: errdefs.IsAborted, 502: errdefs.IsAborted, 503: errdefs.IsAborted, 504: errdefs.IsDeadlineExceeded,
		400: func(err error) bool { return !isTemporary(err) && !errdefs.IsNotFound(err) },
	} {
		f.reset()
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			w.WriteHeader(status)
			fmt.Fprint(w, `{"errors":[{"code":"CODE","message":"broken \u001b[31m\nmessage"}]}`)
			return true
		})
		_, err := fetch(t, open(t, f.host(), Options{}), "latest")
		is(t, err, class)
		if !strings.Contains(err.Error(), "CODE: broken ?[31m message") {
			t.Errorf("%d: the registry's words are missing: %v", status, err)
		}
		want := 1
		if isTemporary(err) {
			want = maxTries
		}
		if f.count() != want {
			t.Errorf("%d: %d tries, not %d", status, f.count(), want)
		}
	}
}

func TestTemporaryFailurePasses(t *testing.T) {
	f := newFake(t)
	content := noise(1000)
	id := f.blob(content)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		switch n {
		case 1:
			w.WriteHeader(http.StatusServiceUnavailable)
		case 2:
			panic(http.ErrAbortHandler)
		case 3:
			w.WriteHeader(http.StatusTooManyRequests)
		}
		return n <= 3
	})
	if got, err := fetch(t, open(t, f.host(), Options{}), id); err != nil || !bytes.Equal(got, content) {
		t.Fatal(err)
	}
}

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	id := f.blob(noise(10))
	after := "1"
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if n == 1 {
			w.Header().Set("Retry-After", after)
			w.WriteHeader(http.StatusTooManyRequests)
		}
		return n == 1
	})
	var told []string
	o := Options{Notify: func(s string) { told = append(told, s) }}
	start := time.Now()
	if _, err := fetch(t, open(t, f.host(), o), id); err != nil {
		t.Fatal(err)
	}
	if time.Since(start) < time.Second {
		t.Error("did not wait")
	}
	if len(told) != 1 || !strings.Contains(told[0], "asks to wait 1s") {
		t.Errorf("told %q", told)
	}
	// A requested pause that is longer than the limit is an immediate failure.
	told, after = nil, "3600"
	f.reset()
	_, err := fetch(t, open(t, f.host(), o), id)
	is(t, err, errdefs.IsResourceExhausted)
	if !strings.Contains(err.Error(), "1h0m0s") || f.count() != 1 || len(told) != 0 {
		t.Errorf("%v after %d tries, told %q", err, f.count(), told)
	}
	// A request that is refused often, among many others, still has all its attempts, but its time is limited.
	c := open(t, f.host(), Options{MaxWait: 100 * time.Millisecond}).clients[0]
	tries, busy := c.newTries(maxTries), &retryAfterError{&statusError{status: 429, class: errdefs.ErrResourceExhausted}, 5 * time.Millisecond}
	for i := range 20 {
		if err := c.wait(context.Background(), tries, busy); err != nil || tries.left != maxTries {
			t.Fatalf("turned away %d times: %v, %d tries left", i+1, err, tries.left)
		}
	}
	is(t, c.wait(context.Background(), tries, busy), errdefs.IsResourceExhausted)
	if d := retryAfter(http.Header{"Retry-After": {time.Now().Add(10 * time.Second).UTC().Format(http.TimeFormat)}}); d < 8*time.Second || d > 11*time.Second {
		t.Errorf("a date ten seconds away: %v", d)
	}
	for _, s := range []string{"", "-5", "soon", "Mon, 02 Jan 2006 15:04:05 GMT"} {
		if d := retryAfter(http.Header{"Retry-After": {s}}); d != 0 {
			t.Errorf("%q: %v", s, d)
		}
	}
}

// Pauses double and are random, so that many clients do not retry at the same time.
func TestBackoff(t *testing.T) {
	seen := map[time.Duration]bool{}
	for range 100 {
		tr := &tries{left: maxTries, pause: firstPause}
		for i := range maxTries - 1 {
			most := firstPause << i
			got := tr.next()
			if got < most/2 || got > most {
				t.Fatalf("pause %d is %v, not between %v and %v", i, got, most/2, most)
			}
			seen[got] = true
		}
		if tr.left != 1 {
			t.Fatalf("%d tries are left", tr.left)
		}
	}
	if len(seen) < 100 {
		t.Errorf("400 pauses are of %d lengths", len(seen))
	}
}

func TestConnectionErrors(t *testing.T) {
	f := newFake(t)
	f.Close()
	_, err := fetch(t, open(t, f.host(), Options{}), "latest")
	is(t, err, errdefs.IsAborted)
	if !strings.Contains(err.Error(), "refused") {
		t.Error(err)
	}
	_, err = fetch(t, open(t, "no-such-host.invalid", Options{}), "latest")
	is(t, err, isTemporary)

	// The reply is not HTTP.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "220 \x1b[31mmail.example ESMTP\r\n\r\n")
			c.Close()
		}
	}()
	if _, err = fetch(t, open(t, l.Addr().String(), Options{}), "latest"); err == nil {
		t.Fatal("a mail server was taken for a registry")
	}
}

func TestStall(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	content := noise(100000)
	id := f.blob(content)
	release := make(chan struct{})
	t.Cleanup(func() { close(release) })
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if n > 1 {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		w.Write(content[:50000])
		w.(http.Flusher).Flush()
		select {
		case <-release:
		case <-r.Context().Done():
		}
		return true
	})
	r := open(t, f.host(), Options{})
	r.clients[0].stall = 50 * time.Millisecond
	if got, err := fetch(t, r, id); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("got %d bytes, %v", len(got), err)
	}
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return true
	})
	_, err := fetch(t, r, id)
	is(t, err, errdefs.IsDeadlineExceeded)
}

// Bytes that arrive slowly, but each in time, are waited for if they are a blob. For a manifest or a list the time is
// limited.
func TestDrip(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	content := noise(30)
	id := f.blob(content)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		}
		for i := range 10000 {
			piece := []byte(" ")
			if strings.Contains(r.URL.Path, "/blobs/") {
				if i == len(content) {
					break
				}
				piece = content[i : i+1]
			}
			w.Write(piece)
			w.(http.Flusher).Flush()
			select {
			case <-r.Context().Done():
				return true
			case <-time.After(20 * time.Millisecond):
			}
		}
		return true
	})
	r := open(t, f.host(), Options{})
	r.clients[0].stall = 200 * time.Millisecond
	if got, err := fetch(t, r, id); err != nil || !bytes.Equal(got, content) {
		t.Errorf("blob: %d bytes, %v", len(got), err)
	}
	_, err := fetch(t, r, "latest")
	is(t, err, errdefs.IsDeadlineExceeded)
	_, err = tags(r)
	is(t, err, errdefs.IsDeadlineExceeded)
}

func TestCancel(t *testing.T) {
	f := newFake(t)
	content := noise(100000)
	id := f.blob(content)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		w.Write(content[:50000])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return true
	})
	ctx, cancel := context.WithCancel(context.Background())
	body, err := open(t, f.host(), Options{}).Fetch(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	cancel()
	if _, err := io.Copy(io.Discard, body); !errors.Is(err, context.Canceled) {
		t.Fatalf("after cancel: %v", err)
	}
	if f.count() != 1 {
		t.Errorf("%d requests", f.count())
	}
}

func TestFetchObject(t *testing.T) {
	f := newFake(t)
	r := open(t, f.host(), Options{})
	for _, id := range []string{"", "sha256:abc", "sha256:" + strings.Repeat("z", 64), "md5:" + strings.Repeat("a", 32), "a/b", "../x", "-x", ".x", "a b", strings.Repeat("a", 129), "latest@sha256:" + strings.Repeat("a", 64)} {
		_, err := fetch(t, r, id)
		is(t, err, errdefs.IsInvalidArgument)
		_, err = r.Resolve(context.Background(), id)
		is(t, err, errdefs.IsInvalidArgument)
	}
	if f.count() != 0 {
		t.Errorf("asked %q", f.seen())
	}
	_, err := fetch(t, r, "Nope_1.2-x")
	is(t, err, errdefs.IsNotFound)
}

// HTTP/2 is not requested, whatever the server supports.
func TestTLSCut(t *testing.T) {
	f := unstarted()
	f.EnableHTTP2 = true
	f.StartTLS()
	t.Cleanup(f.Close)
	content := noise(1 << 20)
	id := f.blob(content)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if n <= 2 {
			from := 0
			if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err == nil {
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(content)-1, len(content)))
				w.Header().Set("Content-Length", fmt.Sprint(len(content)-from))
				w.WriteHeader(http.StatusPartialContent)
			} else {
				w.Header().Set("Content-Length", fmt.Sprint(len(content)))
			}
			w.Write(content[from : from+200000])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		return false
	})
	got, err := fetch(t, open(t, f.host(), Options{HostsDir: trusting(t, f)}), id)
	if err != nil || !bytes.Equal(got, content) {
		t.Fatalf("got %d bytes, %v", len(got), err)
	}
	for i := range f.count() {
		if f.request(i).ProtoMajor != 1 {
			t.Errorf("request %d by %s", i, f.request(i).Proto)
		}
	}
}

// A proxy may compress although no client asked for that.
func TestGzipTransfer(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	m := f.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	id := f.blob(noise(1000))
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		rec := httptest.NewRecorder()
		f.serve(rec, r)
		for name, v := range rec.Header() {
			w.Header()[name] = v
		}
		w.Header().Del("Content-Length")
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		z.Write(rec.Body.Bytes())
		z.Close()
		return true
	})
	r := open(t, f.host(), Options{})
	for _, object := range []string{"latest", m.Digest.String()} {
		if got, err := fetch(t, r, object, "mediatype:"+m.MediaType); err != nil || string(got) != tinyManifest {
			t.Errorf("%s: %q, %v", object, got, err)
		}
	}
	_, err := fetch(t, r, id)
	is(t, err, errdefs.IsDataLoss)
	if !strings.Contains(err.Error(), "gzip") {
		t.Errorf("the reason is missing: %v", err)
	}
	// A small body that decompresses to an extreme size.
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		z.Write(make([]byte, 4*MaxManifest))
		z.Close()
		return true
	})
	_, err = fetch(t, r, "latest")
	is(t, err, errdefs.IsDataLoss)
}

func TestFetchParts(t *testing.T) {
	t.Parallel()
	content := noise(9<<20 + 12345)
	for name, fault := range map[string]func(w http.ResponseWriter, r *http.Request, n int) bool{
		"plain": nil,
		"cut": func(w http.ResponseWriter, r *http.Request, n int) bool {
			if n%3 != 0 {
				return false
			}
			var from, to int
			fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to)
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to, len(content)))
			w.Header().Set("Content-Length", fmt.Sprint(to-from+1))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(content[from : from+(to-from)/2])
			panic(http.ErrAbortHandler)
		},
		"no ranges": func(w http.ResponseWriter, r *http.Request, n int) bool { r.Header.Del("Range"); return false },
		"some ranges": func(w http.ResponseWriter, r *http.Request, n int) bool {
			if n > 2 {
				r.Header.Del("Range")
			}
			return false
		},
		"unknown total": func(w http.ResponseWriter, r *http.Request, n int) bool {
			if r.Header.Get("Range") == "" {
				return false
			}
			w.Header().Set("Content-Range", "bytes 0-99/*")
			w.WriteHeader(http.StatusPartialContent)
			w.Write(content[:100])
			return true
		},
	} {
		f := newFake(t)
		f.reply(fault)
		for _, parts := range []int{3, 8} {
			for _, size := range []int{0, 1, partsMemory / parts, partsMemory/parts + 1, len(content)} {
				if name != "plain" && size < len(content) {
					continue
				}
				id := f.blob(content[:size])
				r := open(t, f.host(), Options{Parts: parts})
				got, err := fetch(t, r, id, fmt.Sprintf("size:%d", size))
				if name == "unknown total" {
					// If the size is known, the first piece is requested as a range, too.
					got, err = fetch(t, r, id)
				}
				if err != nil || !bytes.Equal(got, content[:size]) {
					t.Errorf("%s in %d parts, %d bytes: got %d, %v", name, parts, size, len(got), err)
				}
				if size < 10 {
					continue
				}
				if got, err := fetch(t, r, id, "offset:7"); err != nil || !bytes.Equal(got, content[7:size]) {
					t.Errorf("%s in %d parts, %d bytes, from 7: got %d, %v", name, parts, size, len(got), err)
				}
			}
		}
	}
	// One part has wrong bytes, and a consumer stops reading.
	f := newFake(t)
	id := f.blob(content)
	wrong := slices.Clone(content)
	wrong[6<<20] ^= 1
	f.blobs[digest.Digest(id)] = wrong
	r := open(t, f.host(), Options{Parts: 4})
	got, err := fetch(t, r, id)
	is(t, err, errdefs.IsDataLoss)
	if len(got) >= len(content) {
		t.Error("all of what does not verify was given")
	}
	body, err := r.Fetch(context.Background(), id)
	if err != nil {
		t.Fatal(err)
	}
	io.CopyN(io.Discard, body, 100)
	body.Close()
}
