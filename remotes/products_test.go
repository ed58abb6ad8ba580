package remotes

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// harbor is a fake registry that behaves as Harbor does: it issues tokens only for actions that the user may take,
// keeps sessions by cookies, and states other sizes in replies to HEAD than to GET.
type harbor struct {
	*fake
	mu     sync.Mutex
	tokens int
	scopes []string // those of the last token request
}

const robot = "robot$team+ci"

func newHarbor(t *testing.T) *harbor {
	h := &harbor{fake: newFake(t)}
	h.reply(h.answer)
	return h
}

func (h *harbor) answer(w http.ResponseWriter, r *http.Request, n int) bool {
	unauthorized := func(text string) bool {
		w.Header().Set("Www-Authenticate", fmt.Sprintf(`Bearer realm="%s/service/token",service="harbor-registry",scope="repository:x:pull"`, h.URL))
		return refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", text)
	}
	// A request with a session cookie counts as one from a browser, which must have a token against forgery.
	if r.Header.Get("Cookie") != "" && r.Method != http.MethodGet && r.Method != http.MethodHead {
		return refuse(w, http.StatusForbidden, "FORBIDDEN", "CSRF token not found in request")
	}
	w.Header().Set("Set-Cookie", "sid=0123; Path=/; HttpOnly")
	w.Header().Set("X-Request-Id", "1-2-3")
	if r.URL.Path == "/service/token" {
		user, password, ok := r.BasicAuth()
		switch {
		case r.Method != http.MethodGet:
			w.WriteHeader(http.StatusMethodNotAllowed)
			return true
		case ok && (user != robot || password != oddSecret):
			return refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "unauthorized: unauthorized")
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		h.tokens++
		h.scopes = r.URL.Query()["scope"]
		may := "pull"
		if ok {
			may = "pull,push,delete"
		}
		fmt.Fprintf(w, `{"token":"may:%s:","access_token":"","expires_in":1800,"issued_at":%q}`, may, time.Now().UTC().Format(time.RFC3339))
		return true
	}
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer may:")
	action := map[string]string{http.MethodGet: "pull", http.MethodHead: "pull", http.MethodDelete: "delete"}[r.Method]
	if action == "" || strings.Contains(r.URL.Path, "/blobs/uploads/") {
		action = "push"
	}
	switch {
	case !ok:
		return unauthorized("unauthorized: unauthorized")
	case !strings.Contains(token, action):
		return unauthorized("unauthorized to access repository: x, action: " + action)
	case r.Method == http.MethodHead && strings.Contains(r.URL.Path, "/manifests/"):
		h.fake.mu.Lock()
		m, ok := h.manifests[r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]]
		h.fake.mu.Unlock()
		if ok { // Harbor does this for manifests that it fetches from elsewhere
			w.Header().Set("Content-Type", m.mediaType)
			w.Header().Set("Docker-Content-Digest", digest.FromBytes(m.content).String())
			w.Header().Set("Content-Length", fmt.Sprint(len(m.content)-7))
			return true
		}
	}
	return false
}

// A robot account pushes an image to Harbor and pulls it, with a token for each kind of action. Anybody can pull a
// public image, and an error says which action was refused.
func TestHarbor(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	h := newHarbor(t)
	login := func(secret string) Options { return Options{AuthFile: h.authFile(t, robot+":"+secret)} }
	content := noise(100000)
	id := digest.FromBytes(content)
	r := open(t, h.host(), login(oddSecret))
	if p, err := r.Push(ctx, id.String(), bytes.NewReader(content), "mediatype:a/b"); err != nil || p.State != Stored {
		t.Fatalf("%+v, %v", p, err)
	}
	if p, err := r.Push(ctx, "latest", strings.NewReader(tinyManifest)); err != nil || p.State != Stored {
		t.Fatalf("%+v, %v", p, err)
	}
	other := noise(1000)
	if p, err := r.Push(ctx, digest.FromBytes(other).String(), bytes.NewReader(other), "mediatype:a/b", "mount:other"); err != nil || p.State != Mounted {
		t.Errorf("%+v, %v", p, err)
	}
	if want := "repository:other:pull"; !slices.Contains(h.scopes, want) {
		t.Errorf("the token for a mount is for %q", h.scopes)
	}
	// Actions on one repository are one scope. A token that covers a request is used again.
	if h.tokens > 3 {
		t.Errorf("%d tokens", h.tokens)
	}
	anybody := open(t, h.host(), Options{})
	for what, r := range map[string]*Registry{"robot": r, "anybody": anybody} {
		if b, err := fetch(t, r, "latest"); err != nil || string(b) != tinyManifest {
			t.Errorf("%s: %q, %v", what, b, err)
		}
		if b, err := fetch(t, r, id.String(), "size:100000"); err != nil || !bytes.Equal(b, content) {
			t.Errorf("%s: %d bytes, %v", what, len(b), err)
		}
		if d, err := r.Resolve(ctx, "latest"); err != nil || d.Digest != digest.FromString(tinyManifest) {
			t.Errorf("%s: %+v, %v", what, d, err)
		}
	}
	for what, r := range map[string]*Registry{"anybody": anybody, "wrong password": open(t, h.host(), login("other"))} {
		_, err := r.Push(ctx, digest.FromString(what).String(), strings.NewReader(what), "mediatype:"+ocispec.MediaTypeImageLayer)
		is(t, err, errdefs.IsUnauthorized)
		if what == "anybody" && !strings.Contains(err.Error(), "unauthorized to access repository: x, action: push") {
			t.Errorf("%s: %v", what, err)
		}
		is(t, r.Delete(ctx, "latest"), errdefs.IsUnauthorized)
	}
	if err := r.Delete(ctx, "latest"); err != nil || h.manifests["latest"].content != nil {
		t.Errorf("delete: %v", err)
	}
	for _, q := range h.requests {
		if q.Header.Get("Cookie") != "" {
			t.Errorf("%s %s takes part in a session", q.Method, q.URL.Path)
		}
	}
}

// A cache such as Nexus replies only after it has fetched the whole blob. The client asks once and waits. With a short
// timeout it gives up with a temporary failure, and a later request finds the blob. The cache's first reply states no
// length and ignores ranges.
func TestSlowCache(t *testing.T) {
	t.Parallel()
	content := noise(300000)
	f := newFake(t)
	id := f.blob(content)
	f.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	var mu sync.Mutex
	var began int
	ready := map[string]chan struct{}{}
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		w.Header().Set("Server", "Nexus/3.70.1-02 (OSS)")
		if user, _, _ := r.BasicAuth(); user != "me" {
			w.Header().Set("Www-Authenticate", `BASIC realm="Sonatype Nexus Repository Manager"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		mu.Lock()
		done, isKnown := ready[r.URL.Path]
		if !isKnown {
			began++
			done = make(chan struct{})
			ready[r.URL.Path] = done
		}
		mu.Unlock()
		select {
		case <-done:
			return false
		case <-r.Context().Done():
			return true
		case <-time.After(time.Second):
		}
		if isKnown {
			return false
		}
		close(done)
		w.Header().Set("Content-Type", "application/octet-stream")
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			w.(http.Flusher).Flush() // so that the reply has no length
			w.Write(content)
			return true
		}
		return false
	})
	auth := f.authFile(t, "me:word")
	impatient := open(t, f.host(), Options{AuthFile: auth, Timeout: 50 * time.Millisecond})
	_, err := fetch(t, impatient, id)
	is(t, err, errdefs.IsDeadlineExceeded)
	mu.Lock()
	ready, began = map[string]chan struct{}{}, 0
	mu.Unlock()
	patient := open(t, f.host(), Options{AuthFile: auth, Timeout: time.Minute})
	patient.own().stall = 100 * time.Millisecond // this limits pauses within a body, and not the time before it
	for range 2 {
		if b, err := fetch(t, patient, id, fmt.Sprintf("size:%d", len(content))); err != nil || !bytes.Equal(b, content) {
			t.Errorf("%d bytes, %v", len(b), err)
		}
	}
	if b, err := fetch(t, patient, id, "offset:1000"); err != nil || !bytes.Equal(b, content[1000:]) {
		t.Errorf("from an offset: %d bytes, %v", len(b), err)
	}
	if b, err := fetch(t, patient, "latest"); err != nil || string(b) != tinyManifest {
		t.Errorf("%q, %v", b, err)
	}
	if began != 2 {
		t.Errorf("%d downloads began for a blob and a manifest: %q", began, f.seen())
	}
}
