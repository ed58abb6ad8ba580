package remotes

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func runtimeDir(t *testing.T) string {
	dir := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", dir)
	return filepath.Join(dir, "distkit")
}

// Ten processes ask for one token, and a refused one is fetched anew. Locks of open files
// exclude each other in one process as among many.
func TestSharedToken(t *testing.T) {
	shared := runtimeDir(t)
	k := newTokens(t)
	k.user = "me:word"
	dockerConfig(t, `{"auths":{"`+k.host()+`":{"auth":"`+basic("me:word")+`"}}}`)
	var wg sync.WaitGroup
	for range 10 {
		r := open(t, k.host(), Options{})
		wg.Go(func() {
			if _, err := fetch(t, r, "latest"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(k.asked) != 1 {
		t.Errorf("%d tokens were asked for", len(k.asked))
	}
	// One that comes later does not even need to be told that it needs one.
	k.reset()
	if _, err := fetch(t, open(t, k.host(), Options{}), "latest"); err != nil || k.count() != 1 {
		t.Errorf("%d requests, %v", k.count(), err)
	}
	files, _ := filepath.Glob(filepath.Join(shared, "*"))
	if len(files) != 1 {
		t.Fatalf("files: %q", files)
	}
	for _, name := range files {
		info, _ := os.Stat(name)
		b, _ := os.ReadFile(name)
		if info.Mode().Perm() != 0o600 || strings.Contains(string(b), "word") || !strings.Contains(string(b), "secret-token") {
			t.Errorf("%s %v: %s", name, info.Mode(), b)
		}
		// Another token in its place, which the registry refuses.
		os.WriteFile(name, fmt.Appendf(nil, `{"token":"stale","expires":%q}`, time.Now().Add(time.Hour).Format(time.RFC3339)), 0o600)
	}
	if _, err := fetch(t, open(t, k.host(), Options{}), "latest"); err != nil || len(k.asked) != 2 {
		t.Errorf("after a refusal: %d tokens, %v", len(k.asked), err)
	}
	// Torn and outdated files are none.
	for _, content := range []string{"", "{", `{"token":"old","expires":"2006-01-02T15:04:05Z"}`} {
		before := len(k.asked)
		os.WriteFile(files[0], []byte(content), 0o600)
		if _, err := fetch(t, open(t, k.host(), Options{}), "latest"); err != nil || len(k.asked) != before+1 {
			t.Errorf("%q: %d tokens, %v", content, len(k.asked)-before, err)
		}
	}
	// Another login has its own tokens.
	before := len(k.asked)
	dockerConfig(t, `{"auths":{"`+k.host()+`":{"auth":"`+basic("me:other")+`"}}}`)
	_, err := fetch(t, open(t, k.host(), Options{}), "latest")
	is(t, err, errdefs.IsUnauthorized)
	if len(k.asked) == before {
		t.Error("the token of another login was used")
	}
}

func TestSharedDirNotTrusted(t *testing.T) {
	dir := runtimeDir(t)
	if got := sharedDir(); got != dir {
		t.Fatalf("got %q", got)
	}
	os.Chmod(dir, 0o755)
	if got := sharedDir(); got != "" {
		t.Error("a directory that others can read is trusted")
	}
	os.Remove(dir)
	os.Symlink(t.TempDir(), dir)
	if got := sharedDir(); got != "" {
		t.Error("a link is trusted")
	}
	t.Setenv("XDG_RUNTIME_DIR", "relative")
	if got := sharedDir(); got != "" {
		t.Error("a relative directory is taken")
	}
}

// When a registry asks one process to wait, the others do not ask it either.
func TestSharedWait(t *testing.T) {
	runtimeDir(t)
	f := newFake(t)
	id := f.blob(noise(10))
	start := time.Now()
	after := "1"
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if n == 1 {
			w.Header().Set("Retry-After", after)
			w.WriteHeader(http.StatusTooManyRequests)
		} else if after == "1" && time.Since(start) < 900*time.Millisecond {
			t.Error("asked too early")
		}
		return n == 1
	})
	first := make(chan error)
	r := open(t, f.host(), Options{Notify: func(string) { first <- nil }})
	go func() {
		_, err := fetch(t, r, id)
		first <- err
	}()
	<-first
	var told []string
	if _, err := fetch(t, open(t, f.host(), Options{Notify: func(s string) { told = append(told, s) }}), id); err != nil {
		t.Error(err)
	}
	if err := <-first; err != nil {
		t.Error(err)
	}
	// Too long a wait fails here as it did there.
	f.reset()
	after = "3600"
	for range 2 {
		_, err := fetch(t, open(t, f.host(), Options{}), id)
		is(t, err, errdefs.IsResourceExhausted)
	}
	if f.count() != 1 {
		t.Errorf("%d requests", f.count())
	}
}

// A mirror that wants to be left alone is passed by, as one that is down.
func TestSharedWaitOfMirror(t *testing.T) {
	runtimeDir(t)
	mirror, upstream := newFake(t), newFake(t)
	id := upstream.blob(noise(10))
	mirror.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		w.Header().Set("Retry-After", "30")
		w.WriteHeader(http.StatusTooManyRequests)
		return true
	})
	root := t.TempDir()
	writeHosts(t, root, "good.example", "server = '"+upstream.URL+"'\n[host.'"+mirror.URL+"']\n")
	for range 3 {
		if _, err := fetch(t, open(t, "good.example", Options{HostsDir: root}), id); err != nil {
			t.Fatal(err)
		}
	}
	if mirror.count() != 1 || upstream.count() != 3 {
		t.Errorf("mirror %q, upstream %q", mirror.seen(), upstream.seen())
	}
}

func TestExpiry(t *testing.T) {
	if d := time.Until(expiry("e30.eyJleHAiOjQxMDI0NDQ4MDB9.x")); d < 1000*time.Hour {
		t.Errorf("a JWT of 2100 expires in %v", d)
	}
	for _, s := range []string{"", "opaque", "a.b.c", "e30.e30.x"} {
		if d := time.Until(expiry(s)); d > tokenLife || d < tokenLife-time.Minute/10 {
			t.Errorf("%q expires in %v", s, d)
		}
	}
}
