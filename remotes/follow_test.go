package remotes

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Addresses outside the registry are used only if the caller allows that and the registry does not have the blob. They
// get no secrets, and their content is verified whatever the options.
func TestFollowURLs(t *testing.T) {
	t.Parallel()
	content := noise(3 << 20)
	id := digest.FromBytes(content).String()
	bodies := map[string][]byte{"/layer": content, "/other": noise(1000), "/late": append(content[:len(content)-1:len(content)-1], 'x')}
	var drops int
	site := &recorder{next: func(w http.ResponseWriter, r *http.Request) {
		b, ok := bodies[r.URL.Path]
		switch {
		case r.URL.Path == "/cut":
			if drops++; drops == 1 {
				cut(w, content, 1<<20)
			}
			http.ServeContent(w, r, "", zero, strings.NewReader(string(content)))
		case r.URL.Path == "/moved":
			http.Redirect(w, r, "/layer?signature=1", http.StatusFound)
		case r.URL.Path == "/login":
			w.Header().Set("Www-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		case ok:
			http.ServeContent(w, r, "", zero, strings.NewReader(string(b)))
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}}
	for _, isTLS := range []bool{false, true} {
		site.Server = httptest.NewServer(site)
		t.Cleanup(site.Close)
		f := unstarted()
		start := f.Start
		if isTLS {
			start = f.StartTLS
		}
		start()
		t.Cleanup(f.Close)
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			if _, password, _ := r.BasicAuth(); password == oddSecret && r.Header.Get("X-Key") == oddSecret {
				return false
			}
			w.Header().Set("Www-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		})
		root, auth := t.TempDir(), f.authFile(t, "me:"+oddSecret)
		writeHosts(t, root, f.host(), "server = '"+f.URL+"'\nskip_verify = true\n[header]\nX-Key = '"+oddSecret+"'\n")
		for _, c := range []struct {
			what    string
			hints   []string
			options Options
			class   func(error) bool // nil: success
			asked   int              // the number of requests to the site
		}{
			{"not told to", []string{"url:" + site.URL + "/layer"}, Options{}, errdefs.IsNotFound, 0},
			{"no address", nil, Options{FollowURLs: true}, errdefs.IsNotFound, 0},
			{"one address", []string{"url:" + site.URL + "/layer"}, Options{FollowURLs: true}, nil, 1},
			{"from an offset", []string{"url:" + site.URL + "/layer", "offset:1000"}, Options{FollowURLs: true}, nil, 1},
			{"in parts", []string{"url:" + site.URL + "/layer"}, Options{FollowURLs: true, Parts: 3}, nil, 2},
			{"cut", []string{"url:" + site.URL + "/cut"}, Options{FollowURLs: true}, nil, 2},
			{"redirected", []string{"url:" + site.URL + "/moved"}, Options{FollowURLs: true}, nil, 2},
			{"the second of two", []string{"url:" + site.URL + "/gone", "url:" + site.URL + "/layer"}, Options{FollowURLs: true}, nil, 2},
			{"other content first", []string{"url:" + site.URL + "/other", "url:" + site.URL + "/layer"}, Options{FollowURLs: true, Unverified: true}, nil, 2},
			{"other content", []string{"url:" + site.URL + "/other"}, Options{FollowURLs: true, Unverified: true}, errdefs.IsDataLoss, 1},
			{"other content at the end", []string{"url:" + site.URL + "/late"}, Options{FollowURLs: true, Unverified: true}, errdefs.IsDataLoss, 1},
			{"another size", []string{"url:" + site.URL + "/other", "size:3145728"}, Options{FollowURLs: true}, errdefs.IsDataLoss, 1},
			{"gone", []string{"url:" + site.URL + "/gone"}, Options{FollowURLs: true}, errdefs.IsNotFound, 1},
			{"behind a login", []string{"url:" + site.URL + "/login"}, Options{FollowURLs: true}, errdefs.IsUnauthorized, 1},
			{"a password in it", []string{"url:http://me:word@" + site.host() + "/layer"}, Options{FollowURLs: true}, errdefs.IsInvalidArgument, 0},
			{"a file", []string{"url:file:///etc/passwd"}, Options{FollowURLs: true}, errdefs.IsInvalidArgument, 0},
			{"no host", []string{"url:layer"}, Options{FollowURLs: true}, errdefs.IsInvalidArgument, 0},
		} {
			site.mu.Lock()
			site.all, drops = nil, 0
			site.mu.Unlock()
			c.options.HostsDir, c.options.AuthFile = root, auth
			b, err := fetch(t, open(t, f.host(), c.options), id, c.hints...)
			if c.class != nil {
				is(t, err, c.class)
			} else if want := content[parseHints(c.hints).offset:]; err != nil || string(b) != string(want) {
				t.Errorf("%s: %d bytes, %v", c.what, len(b), err)
			}
			if len(site.all) != c.asked {
				t.Errorf("%s: %d requests, not %d: %s", c.what, len(site.all), c.asked, site.seen())
			}
			if tellsSecret(site.seen()) || strings.Contains(site.seen(), f.host()) {
				t.Errorf("%s: it got %s", c.what, site.seen())
			}
		}
		// The registry has the blob, so it comes from there.
		f.mu.Lock()
		f.blob(content)
		f.mu.Unlock()
		site.all = nil
		if b, err := fetch(t, open(t, f.host(), Options{HostsDir: root, AuthFile: auth, FollowURLs: true}), id, "url:"+site.URL+"/layer"); err != nil || string(b) != string(content) || len(site.all) > 0 {
			t.Errorf("what the registry has: %v, %s", err, site.seen())
		}
	}
}
