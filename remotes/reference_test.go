package remotes

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestParseReference(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.MkdirAll(filepath.Join("dir", "a:b"), 0o755); err != nil {
		t.Fatal(err)
	}
	d := digest.FromString("x").String()
	for _, c := range []struct{ in, name, locator, object string }{
		{"docker.io/redis", "docker.io/library/redis:latest", "docker.io/library/redis", "latest"},
		{"docker.io/library/redis", "docker.io/library/redis:latest", "docker.io/library/redis", "latest"},
		{"index.docker.io/redis:7", "docker.io/library/redis:7", "docker.io/library/redis", "7"},
		{"docker.io/me/x:1", "docker.io/me/x:1", "docker.io/me/x", "1"},
		{"localhost:5000/x", "localhost:5000/x:latest", "localhost:5000/x", "latest"},
		{"localhost:5000/x:1", "localhost:5000/x:1", "localhost:5000/x", "1"},
		{"[::1]:5000/x:1", "[::1]:5000/x:1", "[::1]:5000/x", "1"},
		{"h.example/x@" + d, "h.example/x@" + d, "h.example/x", d},
		{"h.example/x:1@" + d, "h.example/x:1@" + d, "h.example/x", d},
		{"http::http://127.0.0.1:7045", "http::http://127.0.0.1:7045:latest", "http::http://127.0.0.1:7045", "latest"},
		{"http::http://127.0.0.1:7045/x:1", "http::http://127.0.0.1:7045/x:1", "http::http://127.0.0.1:7045/x", "1"},
		{"http::http://127.0.0.1:7045/x@" + d, "http::http://127.0.0.1:7045/x@" + d, "http::http://127.0.0.1:7045/x", d},
		{"ssh::me@[::1]:22/srv/x", "ssh::me@[::1]:22/srv/x:latest", "ssh::me@[::1]:22/srv/x", "latest"},
		{"ssh::h/srv/x:docker.io/library/redis:7", "ssh::h/srv/x:docker.io/library/redis:7", "ssh::h/srv/x", "docker.io/library/redis:7"},
		{"ssh::h/srv/x:1@" + d, "ssh::h/srv/x:1@" + d, "ssh::h/srv/x", d},
		{"dir::x", "dir::x:latest", "dir::x", "latest"},
		{"dir::x:1", "dir::x:1", "dir::x", "1"},
		{"./dir", "./dir:latest", "./dir", "latest"},
		{"./dir:1", "./dir:1", "./dir", "1"},
		{"./dir/a:b", "./dir/a:b:latest", "./dir/a:b", "latest"},
		{"./dir/a:b:1", "./dir/a:b:1", "./dir/a:b", "1"},
		{"./dir:docker.io/library/redis:latest", "./dir:docker.io/library/redis:latest", "./dir", "docker.io/library/redis:latest"},
		{"./dir@" + d, "./dir@" + d, "./dir", d},
		{"./dir:1@" + d, "./dir:1@" + d, "./dir", d},
		{"./none:1", "./none:1", "./none", "1"},
	} {
		r, err := ParseReference(c.in)
		explicit := strings.HasSuffix(c.in, ":"+c.object) || strings.HasSuffix(c.in, "@"+c.object)
		if err != nil || r != (Reference{c.name, c.locator, c.object, explicit}) {
			t.Errorf("%s: %+v, %v", c.in, r, err)
		}
	}
	for _, bad := range []string{"", ":", "@", "redis", "redis:7", "x/y", "localhost:5000", "h.example/", "h.example/x:", "h.example/X", "h.example/x:a b", "h.example/x@sha256:0", "h.example/x:1@md5:0", "::x", "dir::", "dir::-x", "h.example/x:-1", "https://h.example/x"} {
		r, err := ParseReference(bad)
		if strings.HasSuffix(bad, ":") && err == nil && r.Object == "latest" {
			continue
		}
		if err == nil {
			t.Errorf("%q is %+v", bad, r)
			continue
		}
		is(t, err, errdefs.IsInvalidArgument)
	}
}

// Many objects of one remote need one connection and one token.
func TestResolveManyAtOnce(t *testing.T) {
	var mu sync.Mutex
	connections, tokens := 0, 0
	f := unstarted()
	f.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		mu.Lock()
		defer mu.Unlock()
		if s == http.StateNew {
			connections++
		}
	}
	f.Start()
	t.Cleanup(f.Close)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if r.URL.Path == "/token" {
			tokens++
			fmt.Fprint(w, `{"token":"t"}`)
			return true
		}
		if r.Header.Get("Authorization") == "Bearer t" {
			return false
		}
		w.Header().Set("Www-Authenticate", `Bearer realm="`+f.URL+`/token"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	for i := range 50 {
		f.manifest(fmt.Sprint("v", i), ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	}
	r := open(t, f.host(), Options{})
	for i := range 60 {
		_, err := r.Resolve(context.Background(), fmt.Sprint("v", i))
		if (err == nil) != (i < 50) {
			t.Fatal(i, err)
		}
	}
	if connections != 1 || tokens != 1 || f.count() != 72 { // objects that HEAD does not find are requested by GET
		t.Errorf("%d connections, %d tokens, %d requests", connections, tokens, f.count())
	}
}
