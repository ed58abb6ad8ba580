package remotes

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"
)

// keyring finds the credentials of a host in docker's configuration when a registry asks
// for them. What can't be read or run counts as no credentials, so that it breaks no
// anonymous pull; why is kept for the error of a pull that is then refused.
type keyring struct {
	sources  []source
	identity string // changes with the files

	mu      sync.Mutex
	found   map[string]auth.Credential
	trouble string
	// withheld is the realm that credentials were not sent to.
	withheld map[string]string
}

// source is a file of credentials, or what was read of one that can be read once.
type source struct {
	file    string
	content []byte
}

func (s source) open() (credentials.Store, error) {
	if s.content != nil {
		return credentials.NewMemoryStoreFromDockerConfig(s.content)
	}
	return credentials.NewStore(s.file, credentials.StoreOptions{})
}

// newKeyring reads the files for what they say of who the user is, which tokens shared
// between processes depend on.
func newKeyring(files []string, named bool) *keyring {
	k := &keyring{}
	identity := sha256.New()
	for _, name := range files {
		fmt.Fprintln(identity, name)
		from := source{file: name}
		if f, err := os.Open(name); err == nil {
			b, _ := io.ReadAll(io.LimitReader(f, MaxManifest))
			if info, err := f.Stat(); err == nil && !info.Mode().IsRegular() && b != nil {
				from.content = b
			}
			f.Close()
			identity.Write(b)
		} else if named {
			k.complain(err)
		}
		k.sources = append(k.sources, from)
	}
	k.identity = hex.EncodeToString(identity.Sum(nil))
	return k
}

// credential is oras' question for a host:port.
func (k *keyring) credential(ctx context.Context, hostport string) (auth.Credential, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.withheld[hostport] != "" {
		return auth.EmptyCredential, nil
	}
	if c, ok := k.found[hostport]; ok {
		return c, nil
	}
	var found auth.Credential
	for _, from := range k.sources {
		store, err := from.open()
		if err != nil {
			k.complain(err)
			continue
		}
		c, err := credentials.Credential(store)(ctx, hostport)
		if err == nil && c == auth.EmptyCredential && from.content != nil && hostport == "registry-1.docker.io" {
			// Stores in memory know docker's registry by its name, not by its address.
			c, err = store.Get(ctx, "index.docker.io")
		}
		if err != nil {
			if ctx.Err() != nil {
				return auth.EmptyCredential, ctx.Err()
			}
			k.complain(err)
			continue
		}
		if c != auth.EmptyCredential {
			found = c
			break
		}
	}
	if k.found == nil {
		k.found = map[string]auth.Credential{}
	}
	k.found[hostport] = found
	return found, nil
}

func (k *keyring) complain(err error) {
	k.trouble = "credentials: " + printable(err.Error())
}

// explain tells why a host refused, where the credentials are the reason.
func (k *keyring) explain(hostport string) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	if realm := k.withheld[hostport]; realm != "" {
		return "credentials were not sent to " + realm + ", which is not of this host"
	}
	return k.trouble
}

// challenged sees where a registry sends its clients for a token, before they go there.
// Credentials for a host go to the host itself, and to realms below the same domain.
func (k *keyring) challenged(registry *url.URL, challenge string) {
	realm, err := url.Parse(realmOf(challenge))
	if err != nil || realm.Host == "" || sameOwner(registry.Hostname(), realm.Hostname()) {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.withheld == nil {
		k.withheld = map[string]string{}
	}
	k.withheld[registry.Host] = realm.Host
}

func realmOf(challenge string) string {
	scheme, params, _ := strings.Cut(challenge, " ")
	if !strings.EqualFold(scheme, "bearer") {
		return ""
	}
	i := strings.Index(strings.ToLower(params), `realm=`)
	if i < 0 {
		return ""
	}
	value := params[i+len("realm="):]
	if s, ok := strings.CutPrefix(value, `"`); ok {
		value, _, _ = strings.Cut(s, `"`)
	} else {
		value, _, _ = strings.Cut(value, ",")
	}
	return value
}

// sameOwner tells whether two hosts belong together: the same host, or names below one
// domain, as registry-1.docker.io and auth.docker.io, registry.gitlab.com and gitlab.com.
func sameOwner(a, b string) bool {
	a, b = strings.ToLower(a), strings.ToLower(b)
	if a == b {
		return true
	}
	if net.ParseIP(a) != nil || net.ParseIP(b) != nil {
		return false
	}
	return domain(a) != "" && domain(a) == domain(b)
}

// domain is what somebody registered: two labels, or three below those of countries that
// have levels of their own (co.uk).
func domain(host string) string {
	labels := strings.Split(strings.TrimSuffix(host, "."), ".")
	n := 2
	if len(labels) > 2 && len(labels[len(labels)-1]) == 2 {
		switch labels[len(labels)-2] {
		case "ac", "co", "com", "edu", "go", "gov", "gob", "ne", "net", "or", "org":
			n = 3
		}
	}
	if len(labels) < n {
		return ""
	}
	return strings.Join(labels[len(labels)-n:], ".")
}

// configFiles are where credentials are looked for: the one file that was named where one
// was, else docker's configuration, then that of podman and skopeo.
func configFiles(o Options) (files []string, named bool) {
	if file := cmp.Or(o.AuthFile, os.Getenv("REGISTRY_AUTH_FILE")); file != "" {
		return []string{file}, true
	}
	if dir := os.Getenv("DOCKER_CONFIG"); dir != "" {
		files = append(files, filepath.Join(dir, "config.json"))
	} else if home, err := os.UserHomeDir(); err == nil {
		files = append(files, filepath.Join(home, ".docker", "config.json"))
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		files = append(files, filepath.Join(dir, "containers", "auth.json"))
	}
	return files, false
}
