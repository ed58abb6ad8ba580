package remotes

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"

	"distkit/refname"

	"github.com/containerd/errdefs"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"
)

// sentKey is the context key of a variable that receives the Authorization last sent to the registry.
type sentKey struct{}

// Authorization returns a value of the Authorization header for requests to a repository's registry, or "" if the
// registry needs none. A scope is a list of actions on the repository, such as "pull,push", or a full scope
// (repository:other:pull). The default is "pull".
func Authorization(ctx context.Context, locator string, o Options, scopes ...string) (string, error) {
	remote, err := Open(locator, o)
	if err != nil {
		return "", err
	}
	r, ok := remote.(*Registry)
	if !ok {
		return "", classf(errdefs.ErrNotImplemented, "%s is not a registry, and needs no header", locator)
	}
	if len(scopes) == 0 {
		scopes = []string{auth.ActionPull}
	}
	full := make([]string, len(scopes))
	for i, scope := range scopes {
		if full[i] = scope; !strings.Contains(scope, ":") {
			full[i] = auth.ScopeRepository(r.locator.Name, strings.Split(scope, ",")...)
		}
		if scope == "" || strings.ContainsFunc(scope, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' }) {
			return "", classf(errdefs.ErrInvalidArgument, "scope %q: write actions, such as pull,push, or TYPE:NAME:ACTIONS", scope)
		}
	}
	sent, err := r.authorization(ctx, full)
	if err != nil {
		return "", fmt.Errorf("get a token for %s: %w", r.locator, err)
	}
	return sent, nil
}

func (r *Registry) authorization(ctx context.Context, scopes []string) (sent string, err error) {
	c := r.own()
	ctx = context.WithValue(ctx, sentKey{}, &sent)
	// Some registries let anyone in at the root, and ask for authentication at the repository.
	for _, path := range []string{"/", "/" + r.locator.Name + "/tags/list"} {
		err = c.ask(ctx, request{method: http.MethodGet, path: path, header: http.Header{}, scopes: scopes})
		if c.login.isWithheld() {
			return "", classf(errdefs.ErrUnauthenticated, "%s", c.login.explain())
		}
		if strings.HasPrefix(sent, "Bearer ") {
			return sent, nil // the token is valid, even if this very request is refused
		}
		if err != nil && !errdefs.IsNotFound(err) || sent != "" {
			break
		}
	}
	if errdefs.IsNotFound(err) {
		err = nil
	}
	return sent, err
}

// ask sends a request of which only the status matters.
func (c *client) ask(ctx context.Context, r request) error {
	resp, err := c.do(ctx, r, c.newTries(maxTries))
	if err == nil {
		resp.Body.Close()
	}
	return err
}

func (l *login) isWithheld() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.withheld != ""
}

// account is the place of the credentials for a host, or for the repositories below a path on it.
type account struct {
	endpoint
	key    string // in auth files and for helpers
	prefix string // the key in canonical form
}

// newAccount parses HOST or HOST/PATH. The account's host is that of the endpoint, because credentials are sent there.
func newAccount(name string, o Options) (account, error) {
	host, path, hasPath := strings.Cut(strings.TrimSuffix(name, "/"), "/")
	_, config, err := readHost(host, o)
	if err == nil && hasPath && !refname.IsRepository(path) {
		err = classf(errdefs.ErrInvalidArgument, "%q is neither HOST nor HOST/PATH", name)
	}
	if err != nil {
		return account{}, err
	}
	a := account{endpoint: config.endpoints[len(config.endpoints)-1]}
	a.key, a.prefix = a.host, authHost(a.scheme, a.host)
	isHub := a.prefix == authHost(a.scheme, dockerHub)
	switch {
	case hasPath && isHub:
		a.key, a.prefix = dockerHub+"/"+path, a.prefix+"/"+path
	case hasPath:
		a.key, a.prefix = a.key+"/"+path, a.prefix+"/"+path
	case isHub:
		a.key = dockerHubServer
	}
	return a, nil
}

// helpers returns the helpers that a credential file names for the account.
func (a account) helpers(f authFile) (list []string) {
	for _, key := range keysOf(f.CredHelpers, a.scheme, a.prefix) {
		if f.CredHelpers[key] != "" {
			list = append(list, f.CredHelpers[key])
		}
	}
	if f.CredsStore != "" && !strings.Contains(a.prefix, "/") {
		list = append(list, f.CredsStore)
	}
	return list
}

// Login verifies a username and password against a registry, and stores them in the credential helper that the
// credential file names for the host or, without one, in the file. It returns the place. The file is that of the
// options or of REGISTRY_AUTH_FILE, or else docker's config.json, which podman reads too.
func Login(ctx context.Context, host string, o Options, username, password string) (place string, err error) {
	a, err := newAccount(host, o)
	if err != nil {
		return "", err
	}
	if username == "" || password == "" || strings.Contains(username, ":") || strings.ContainsAny(username+password, "\x00\r\n") {
		return "", classf(errdefs.ErrInvalidArgument, "need a username without a colon and a password of one line")
	}
	c := auth.Credential{Username: username, Password: password}
	if err := a.verify(ctx, o, c); err != nil {
		return "", fmt.Errorf("log in to %s: %w", host, err)
	}
	if place, err = a.store(ctx, loginFile(o), c); err != nil {
		return "", fmt.Errorf("store the credentials for %s: %w", host, err)
	}
	return place, nil
}

// verify sends the credential to the registry. It uses no cached token.
func (a account) verify(ctx context.Context, o Options, c auth.Credential) error {
	l := &login{keys: &keyring{}, name: a.key, options: []candidate{{Credential: c}}}
	client := newClient(a.endpoint, o, l)
	client.tokens.dir = ""
	var sent string
	ctx = context.WithValue(ctx, sentKey{}, &sent)
	req := request{method: http.MethodGet, path: "/", header: http.Header{}}
	err := client.ask(ctx, req)
	if err == nil && l.isWithheld() {
		err = classf(errdefs.ErrUnauthenticated, "%s", l.explain())
	}
	if err == nil && sent == "" {
		// The registry lets anyone in, but may still check credentials that it didn't ask for.
		req.header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(c.Username+":"+c.Password)))
		err = client.ask(ctx, req)
	}
	return err
}

func loginFile(o Options) string {
	files, _ := configFiles(o)
	return files[0]
}

func (a account) store(ctx context.Context, file string, c auth.Credential) (place string, err error) {
	place = file
	err = editAuthFile(ctx, file, func(f authFile, b []byte) ([]byte, error) {
		entry, err := json.Marshal(map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte(c.Username + ":" + c.Password))})
		if err != nil {
			return nil, err
		}
		if helpers := a.helpers(f); len(helpers) > 0 {
			if err := credentials.NewNativeStore(helpers[0]).Put(ctx, a.key, c); err != nil {
				return nil, helperError(helpers[0], err)
			}
			// An empty entry tells docker that the helper has the credentials.
			place, entry = helperPrefix+helpers[0], []byte("{}")
		}
		if b, err = removeAuths(b, keysOf(f.Auths, a.scheme, a.prefix)); err != nil {
			return nil, err
		}
		return setAuth(b, a.key, entry)
	})
	return place, err
}

const helperPrefix = "docker-credential-"

func helperError(name string, err error) error {
	return fmt.Errorf("%s%s: %s", helperPrefix, name, printable(err.Error()))
}

// Logout removes the credentials for a host from every file and helper in which the other commands would find them, and
// returns these places. NotFound if there were none.
func Logout(ctx context.Context, host string, o Options) (places []string, err error) {
	a, err := newAccount(host, o)
	if err != nil {
		return nil, err
	}
	files, named := configFiles(o)
	var failed []error
	for _, file := range files {
		if _, err := os.Stat(file); errors.Is(err, os.ErrNotExist) {
			continue
		}
		err := editAuthFile(ctx, file, func(f authFile, b []byte) ([]byte, error) {
			for _, helper := range a.helpers(f) {
				store := credentials.NewNativeStore(helper)
				found, err := store.Get(ctx, a.key)
				if err == nil && found != auth.EmptyCredential {
					if err = store.Delete(ctx, a.key); err == nil {
						places = append(places, helperPrefix+helper)
					}
				}
				if err != nil {
					failed = append(failed, helperError(helper, err))
				}
			}
			keys := keysOf(f.Auths, a.scheme, a.prefix)
			for _, key := range keys {
				if c, err := parseAuth(f.Auths[key]); err != nil || c != auth.EmptyCredential {
					places = append(places, file)
					break
				}
			}
			return removeAuths(b, keys)
		})
		if err != nil {
			failed = append(failed, err)
		}
	}
	if !named {
		for _, f := range newKeyring(nil, false).files {
			if len(keysOf(f.Auths, a.scheme, a.prefix)) > 0 {
				failed = append(failed, classf(errdefs.ErrFailedPrecondition, "the environment variable DOCKER_AUTH_CONFIG has credentials"))
			}
		}
	}
	switch {
	case len(failed) > 0:
		return places, fmt.Errorf("log out of %s: %w", host, failed[0])
	case len(places) == 0:
		return nil, classf(errdefs.ErrNotFound, "log out of %s: no credentials in %s", host, strings.Join(files, ", "))
	}
	return places, nil
}
