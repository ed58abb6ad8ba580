package serve

import (
	"bufio"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"golang.org/x/crypto/bcrypt"
)

// Users are names with the bcrypt hashes of their passwords.
type Users struct {
	hashes map[string][]byte
	// decoy is the hash to compare with if the user doesn't exist, so that the reply takes as long as for an existing
	// user.
	decoy []byte

	// A client sends its password with each request, and bcrypt is slow by design. So correct passwords are remembered,
	// as a keyed hash, as long as the process lives.
	key   []byte
	mu    sync.Mutex
	right map[[sha256.Size]byte]bool
	// slow bounds the number of passwords that are compared concurrently.
	slow slots
}

// maxUsersFile bounds the size of a file of users in bytes.
const maxUsersFile = 8 << 20

// ReadUsers parses lines USER:HASH, as htpasswd -B writes them. InvalidArgument if a hash is not bcrypt's.
func ReadUsers(r io.Reader) (*Users, error) {
	u := &Users{hashes: map[string][]byte{}, key: make([]byte, 32), right: map[[sha256.Size]byte]bool{}}
	_, _ = rand.Read(u.key) // never fails
	cost := bcrypt.MinCost
	lines := bufio.NewScanner(io.LimitReader(r, maxUsersFile))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		name, hash, ok := strings.Cut(line, ":")
		c, err := bcrypt.Cost([]byte(hash))
		if !ok || name == "" || err != nil {
			return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "line %d: not USER:HASH with a bcrypt hash, as htpasswd -B writes it", n)
		}
		u.hashes[name], cost = []byte(hash), max(cost, c)
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if len(u.hashes) == 0 {
		return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "it has no users")
	}
	var err error
	u.decoy, err = bcrypt.GenerateFromPassword([]byte("no password"), cost)
	if err != nil {
		return nil, fmt.Errorf("hash a password: %w", err)
	}
	return u, nil
}

// maxRight bounds the number of remembered passwords. Each user has one, in few spellings.
const maxRight = 1 << 10

// allow reports whether a request has the name and password of a user. The error is the context's.
func (u *Users) allow(r *http.Request) (bool, error) {
	name, password, ok := r.BasicAuth()
	if !ok {
		return false, nil
	}
	mac := hmac.New(sha256.New, u.key)
	fmt.Fprintf(mac, "%d:%s:%s", len(name), name, password)
	sum := [sha256.Size]byte(mac.Sum(nil))
	u.mu.Lock()
	known := u.right[sum]
	u.mu.Unlock()
	if known {
		return true, nil
	}
	release, err := u.slow.take(r.Context(), 2)
	if err != nil {
		return false, err
	}
	defer release()
	hash, exists := u.hashes[name]
	if !exists {
		hash = u.decoy
	}
	if bcrypt.CompareHashAndPassword(hash, []byte(password)) != nil || !exists {
		return false, nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.right) < maxRight {
		u.right[sum] = true
	}
	return true, nil
}
