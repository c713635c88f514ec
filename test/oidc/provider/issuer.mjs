// A certified OpenID provider on loopback: node issuer.mjs PORT. It says "listening" when it does.
//
// Clients get access tokens by client_credentials. The resource urn:klamm:AUDIENCE:ALGORITHM:SECONDS says for whom the
// token is, how it is signed ("opaque": it is no JWT), and how long it counts.
//
// Beside what a provider has: POST /control/rotate replaces all keys, GET /control/fetches counts those of the keys.
import crypto from 'node:crypto';
import http from 'node:http';
import Provider from 'oidc-provider';

const port = Number(process.argv[2]);
const issuer = `http://127.0.0.1:${port}`;
let generation = 0;
let fetches = 0;

const kinds = {
  RS256: ['rsa', { modulusLength: 2048 }],
  PS256: ['rsa', { modulusLength: 2048 }],
  ES256: ['ec', { namedCurve: 'P-256' }],
  EdDSA: ['ed25519', {}],
};

function keys() {
  generation += 1;
  return Object.entries(kinds).map(([alg, [type, options]]) => ({
    ...crypto.generateKeyPairSync(type, options).privateKey.export({ format: 'jwk' }),
    kid: `${alg}-${generation}`,
    use: 'sig',
    alg,
  }));
}

function resource(urn) {
  const [, , audience, alg, seconds] = urn.split(':');
  const token = { scope: 'kafka', audience, accessTokenTTL: Number(seconds) };
  if (alg === 'opaque') return { ...token, accessTokenFormat: 'opaque' };
  return { ...token, accessTokenFormat: 'jwt', jwt: { sign: { alg } } };
}

const client = (id) => ({
  client_id: id,
  client_secret: `${id}-secret`,
  grant_types: ['client_credentials'],
  redirect_uris: [],
  response_types: [],
});

const provider = () => new Provider(issuer, {
  clients: ['orders', 'billing', 'klamm'].map(client),
  jwks: { keys: keys() },
  extraTokenClaims: () => ({ team: 'payments' }),
  features: {
    devInteractions: { enabled: false },
    clientCredentials: { enabled: true },
    resourceIndicators: {
      enabled: true,
      useGrantedResource: () => true,
      getResourceServerInfo: (_, urn) => resource(urn),
    },
  },
}).callback();

let serve = provider();
http.createServer((request, response) => {
  if (request.url === '/control/rotate') {
    serve = provider();
    response.end();
    return;
  }
  if (request.url === '/control/fetches') {
    response.end(String(fetches));
    return;
  }
  if (request.url === '/jwks') fetches += 1;
  serve(request, response);
}).listen(port, '127.0.0.1', () => console.log('listening'));
