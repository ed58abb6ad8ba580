package remotes

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// challenge is one authentication scheme that a server offers (RFC 9110, section 11.6.1).
type challenge struct {
	scheme string
	params map[string]string // by lower-case name; the first of several with the same name
}

// parseChallenges parses one WWW-Authenticate field, which may hold several challenges. Malformed text is skipped up to
// the next comma.
func parseChallenges(field string) (list []challenge) {
	bare := false // the last challenge has no parameter yet, and no comma after it
	for {
		rest := strings.TrimLeft(field, " \t,")
		if strings.Contains(field[:len(field)-len(rest)], ",") {
			bare = false
		}
		word := token(rest)
		if rest == "" {
			return list
		}
		if word == "" {
			field = afterComma(rest)
			bare = false
			continue
		}
		rest = strings.TrimLeft(rest[len(word):], " \t")
		value, isParam := strings.CutPrefix(rest, "=")
		value = strings.TrimLeft(value, " \t")
		switch {
		case isParam && value != "" && value[0] != ',' && value[0] != '=':
			text, after := parameter(value)
			if n := len(list) - 1; n >= 0 {
				if name := strings.ToLower(word); list[n].params == nil {
					list[n].params = map[string]string{name: text}
				} else if _, twice := list[n].params[name]; !twice {
					list[n].params[name] = text
				}
			}
			field = after
		case isParam || bare: // a token68 after the scheme, as with Negotiate
			field = afterComma(rest)
		default:
			list = append(list, challenge{scheme: word})
			field, bare = rest, true
			continue
		}
		bare = false
	}
}

// token returns the token at the beginning of s (RFC 9110, section 5.6.2), or "".
func token(s string) string {
	end := strings.IndexFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("!#$%&'*+-.^_`|~", r)
	})
	if end < 0 {
		return s
	}
	return s[:end]
}

// parameter splits s after the parameter value at its beginning. An unquoted value may contain characters that should
// be quoted, because registries write addresses so.
func parameter(s string) (value, after string) {
	if s[0] != '"' {
		if end := strings.IndexAny(s, ", \t"); end >= 0 {
			return s[:end], s[end:]
		}
		return s, ""
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '"':
			return b.String(), s[i+1:]
		case s[i] == '\\' && i+1 < len(s):
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String(), "" // the closing quote is missing
}

func afterComma(s string) string {
	_, after, _ := strings.Cut(s, ",")
	return after
}

// chooseChallenge reduces the header to one challenge in the form that oras parses: Bearer with a realm or, without
// that, Basic, in whatever order and number of fields they come. If there is neither, it removes the header and returns
// the offered schemes.
func chooseChallenge(h http.Header) (refused []string) {
	const name = "Www-Authenticate"
	var all []challenge
	for _, field := range h[name] {
		all = append(all, parseChallenges(field)...)
	}
	isBearer := func(c challenge) bool { return strings.EqualFold(c.scheme, "bearer") && c.params["realm"] != "" }
	isBasic := func(c challenge) bool { return strings.EqualFold(c.scheme, "basic") }
	for _, is := range []func(challenge) bool{isBearer, isBasic} {
		if i := slices.IndexFunc(all, is); i >= 0 {
			h[name] = []string{all[i].String()}
			return nil
		}
	}
	for _, c := range all {
		if !slices.Contains(refused, c.scheme) && len(refused) < 5 {
			refused = append(refused, c.scheme)
		}
	}
	delete(h, name)
	return refused
}

// String formats the challenge with the parameters that a client needs.
func (c challenge) String() string {
	s := c.scheme
	for i, name := range []string{"realm", "service", "scope"} {
		if value, ok := c.params[name]; ok {
			if i > 0 {
				s += ","
			}
			s += " " + name + "=" + strconv.Quote(value)
		}
	}
	return s
}
